"""A thread that watches a vhost-user back end: whether it lives, and what it says unasked.

Source: QEMU docs/interop/vhost-user.rst, "Back-end message types".
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.vhost_user_messages import BackendRequest, MalformedMessageError

__all__ = ["VhostUserWatch"]

_REST_SECONDS: Final = 5.0
"""Seconds for the rest of a message that a back end has begun."""

_NOT_SUPPORTED: Final = 1


class VhostUserWatch(Closeable):
    """A thread beside a vhost-user connection.

    Args:
        connection: descriptor of the connection's socket; it is only looked at for its end.
        name: the back end in messages.
        on_failure: called, once and from the thread, with what has happened to the back end.
        on_config: called from the thread when the back end has changed its configuration.

    Attributes:
        error: an eventfd for SET_VRING_ERR of all rings.
    """

    def __init__(
        self,
        connection: int,
        name: str,
        on_failure: Callable[[str], None],
        on_config: Callable[[], None],
    ) -> None:
        self._name = name
        self._on_failure = on_failure
        self._on_config = on_config
        self._connection = connection
        self._channel: socket.socket | None = None
        self.error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLRDHUP)
        self._poll.register(self.error, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"watch of {name}", daemon=True)

    def open_channel(self) -> socket.socket:
        """Make the back end's channel for requests; return its end, for the caller to close.

        Call it before `start`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(_REST_SECONDS)
        self._channel = ours
        self._poll.register(ours, select.POLLIN)
        return theirs

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                ready = {fd for fd, _ in self._poll.poll()}
                if self._wake in ready:
                    return
                if self._connection in ready:
                    self._on_failure(f"{self._name} has closed its connection")
                    return
                if self.error in ready:
                    self._on_failure(f"{self._name} has met an error in a virtqueue")
                    return
                self._serve()
        except MalformedMessageError as error:
            self._on_failure(f"{self._name}: {error.problem}")
        except OSError as error:
            self._on_failure(f"{self._name} stopped within a message ({error})")

    def _serve(self) -> None:
        """Serve one request of the back end."""
        channel = self._channel
        assert channel is not None
        first = channel.recv(messages.HEADER_SIZE)
        if not first:
            self._poll.unregister(channel)  # the connection's own end says more
            return
        header = messages.parse_header(_rest(channel, first, messages.HEADER_SIZE))
        _rest(channel, b"", header.size)
        if header.is_reply:
            raise MalformedMessageError(f"a reply {header.code} that nobody has asked for")
        known = header.code == BackendRequest.CONFIG_CHANGE_MSG
        if header.need_reply:
            channel.sendall(messages.acknowledgement(header.code, 0 if known else _NOT_SUPPORTED))
        if known:
            self._on_config()

    def close(self) -> None:
        """Stop to watch, and close the channel. Harmless twice."""
        if self._wake < 0:
            return
        if not self.inherited and self._thread.is_alive():
            with contextlib.suppress(OSError):
                if self._channel is not None:
                    self._channel.shutdown(socket.SHUT_RDWR)  # ends a wait within a message
            os.eventfd_write(self._wake, 1)
            if self._thread is not threading.current_thread():
                self._thread.join()
        os.close(self._wake)
        os.close(self.error)
        self._wake = self.error = -1
        if self._channel is not None:
            self._channel.close()


def _rest(channel: socket.socket, data: bytes, size: int) -> bytes:
    """Return `data` and what is missing to `size` bytes; the kernel closes descriptors with it."""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the channel has closed")
        data += part
    return data
