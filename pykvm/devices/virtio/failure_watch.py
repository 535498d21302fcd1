"""A thread that waits for the failure of what has no thread of ours: a kernel's data plane."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Mapping
from typing import Final

from pykvm.closeable import Closeable

__all__ = ["FailureWatch"]

_MILLISECONDS: Final = 1000


class FailureWatch(Closeable):
    """A thread that calls what belongs to a descriptor.

    Args:
        name: the device, for the thread's name.
        written: eventfds, and what to call each time when one was written.
        broken: descriptors, and what to call once when one has an error or was hung up. They
            are looked at every second: a TAP that is removed wakes readers alone, and so does each
            frame (drivers/net/tun.c, tun_detach_all).
    """

    def __init__(
        self,
        name: str,
        written: Mapping[int, Callable[[], None]],
        broken: Mapping[int, Callable[[], None]],
    ) -> None:
        self._written = frozenset(written)
        self._calls = {**written, **broken}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        for fd in written:
            self._poll.register(fd, select.POLLIN)
        for fd in broken:
            self._poll.register(fd, 0)  # errors and hang-ups are reported without being asked for
        self._milliseconds = _MILLISECONDS if broken else None
        self._thread = threading.Thread(
            target=self._run, args=(self._wake,), name=f"watch of {name}", daemon=True
        )
        self._thread.start()

    def _run(self, wake: int) -> None:
        while True:
            for fd, _ in self._poll.poll(self._milliseconds):
                if fd == wake:
                    return
                if fd in self._written:
                    os.eventfd_read(fd)
                else:
                    self._poll.unregister(fd)
                self._calls[fd]()

    def close(self) -> None:
        """Stop to watch; the descriptors stay open. Harmless twice."""
        wake, self._wake = self._wake, -1
        if wake < 0:
            return
        if not self.inherited:
            os.eventfd_write(wake, 1)
            self._thread.join()
        os.close(wake)
