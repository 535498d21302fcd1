"""A guest's console on this process's standard input and output."""

from __future__ import annotations

import os
import select
import termios
import threading
import tty
from collections.abc import Callable
from typing import Any, Final

from pykvm.closeable import Closeable

__all__ = ["ESCAPE", "Console"]

ESCAPE: Final = b"\x1d"  #: Ctrl-]

_STDIN: Final = 0
_CHUNK: Final = 1024
_POLL: Final = 0.02  # seconds, while a guest has no room for more input


class Console(Closeable):
    """Input of a guest's port, from a descriptor, until it is closed.

    A terminal is put into raw mode, so that every key is the guest's but `ESCAPE`, and is restored
    by close(). The end of other input ends nothing.

    Args:
        feed: takes bytes for the guest, and returns how many of them it has taken now.
        leave: called once when the escape is typed.
        descriptor: where input comes from.
    """

    def __init__(
        self,
        feed: Callable[[bytes], int],
        leave: Callable[[], object],
        descriptor: int = _STDIN,
    ) -> None:
        self._feed_guest = feed
        self._leave = leave
        self._descriptor = descriptor
        self._settings: list[Any] | None = None
        self._closed = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._copy, name="console", daemon=True)
        if os.isatty(descriptor):
            self._settings = termios.tcgetattr(descriptor)
            tty.setraw(descriptor)
            # Output stays cooked: a newline of ours goes to the first column.
            changed = termios.tcgetattr(descriptor)
            changed[1] |= termios.OPOST | termios.ONLCR
            termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        self._thread.start()

    def close(self) -> None:
        """Read no more input, and restore the terminal. Harmless twice."""
        if self._closed:
            return
        self._closed = True
        os.close(self._wake_write)
        self._thread.join()
        os.close(self._wake_read)
        if self._settings is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._settings)

    def _copy(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, self._wake_read], [], [])
            if self._wake_read in ready:
                return
            try:
                data = os.read(self._descriptor, _CHUNK)
            except OSError:
                return
            if not data:
                return
            if self._settings is not None and ESCAPE in data:
                self._leave()
                return
            if not self._feed(data):
                return

    def _feed(self, data: bytes) -> bool:
        """Give the guest all of it; return whether the console is still wanted."""
        while data := data[self._feed_guest(data) :]:
            if select.select([self._wake_read], [], [], _POLL)[0]:
                return False
        return True
