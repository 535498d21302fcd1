"""A vhost-user connection: requests to a back end, and their replies within a time.

Source: QEMU docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.vhost_user_messages import MalformedMessageError, Request
from pykvm.errors import PykvmError

__all__ = [
    "REPLY_SECONDS",
    "BackendError",
    "BackendFailedError",
    "BackendGoneError",
    "BackendHungError",
    "BackendRefusedError",
    "VhostUserConnection",
]

REPLY_SECONDS: Final = 30.0
"""Seconds that a back end may take for a reply: it may have to finish requests, on a busy host."""


class BackendError(PykvmError):
    """Root of the errors of vhost-user back ends."""


class BackendGoneError(BackendError):
    """A back end has closed its connection, or none listens."""


class BackendFailedError(BackendError):
    """A back end that has failed before."""


class BackendHungError(BackendError):
    """A back end has not answered in time."""


class BackendRefusedError(BackendError):
    """A back end refuses a request, or lacks what the device needs."""


class VhostUserConnection(Closeable):
    """One connection to a back end. Methods may be called from any thread.

    The first error ends the connection: its replies would no longer match the requests.

    Args:
        sock: a connected stream socket; the connection owns it from now on.
        name: the back end in messages.
        timeout: seconds that each reply may take.

    Attributes:
        acknowledges: whether REPLY_ACK was negotiated.
        explain: returns what is known about the end of a back end that is gone, or "".
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float = REPLY_SECONDS) -> None:
        self.name = name
        self.acknowledges = False
        self.explain: Callable[[], str] = str
        self._socket = sock
        self._timeout = timeout
        self._lock = threading.Lock()
        self._broken: PykvmError | None = None

    @classmethod
    def connect(
        cls, path: Path, name: str = "", timeout: float = REPLY_SECONDS
    ) -> VhostUserConnection:
        """Connect to the back end that listens on the Unix socket `path`.

        Raises:
            BackendGoneError: none does.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(timeout)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            reason = (error.strerror or str(error)).lower()
            raise BackendGoneError(
                f"no vhost-user back end at {path} ({reason})", "start it first"
            ) from error
        return cls(sock, name or f"the back end at {path}", timeout)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 after close()."""
        return self._socket.fileno()

    def request(self, code: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Make a request that has no reply of its own; wait for its acknowledgement if there is.

        Raises:
            BackendError: the back end is gone, hangs, or refuses it.
            MalformedMessageError: it answers rubbish.
        """
        if not self.acknowledges:
            self._exchange(code, payload, fds, answered=False)
            return
        status = messages.parse_number(self._exchange(code, payload, fds, need_reply=True))
        if status:
            raise BackendRefusedError(
                f"{self.name} refuses {code.name} with {status:#x}", "see its own messages"
            )

    def ask(self, code: Request, payload: bytes = b"") -> bytes:
        """Make a request with a reply of its own; return the reply's payload.

        Raises:
            BackendError: the back end is gone or hangs.
            MalformedMessageError: it answers rubbish.
        """
        assert code in messages.ALWAYS_ANSWERED
        return self._exchange(code, payload, ())

    def _exchange(
        self,
        code: Request,
        payload: bytes,
        fds: Sequence[int],
        *,
        answered: bool = True,
        need_reply: bool = False,
    ) -> bytes:
        with self._lock:
            if self._broken is not None:
                raise self._broken
            try:
                deadline = time.monotonic() + self._timeout
                self._send(messages.request(code, payload, need_reply=need_reply), fds, deadline)
                return self._reply(code, deadline) if answered else b""
            except TimeoutError:
                self._broken = BackendHungError(
                    f"{self.name} has not answered {code.name} in {self._timeout:g} seconds",
                    "see whether it still runs",
                )
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                known = self.explain()
                self._broken = BackendGoneError(
                    known or f"{self.name} is gone at {code.name} ({reason})",
                    "" if known else "see its own messages",
                )
            except MalformedMessageError as error:
                self._broken = MalformedMessageError(f"{self.name} at {code.name}: {error.problem}")
            raise self._broken

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        self._wait_until(deadline)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        while sent < len(data):
            self._wait_until(deadline)
            sent += self._socket.send(data[sent:], socket.MSG_NOSIGNAL)

    def _reply(self, code: Request, deadline: float) -> bytes:
        header = messages.parse_header(self._receive(messages.HEADER_SIZE, deadline))
        if header.code != code or not header.is_reply:
            raise MalformedMessageError(f"message {header.code} in place of a reply to {code:d}")
        return self._receive(header.size, deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        """Receive `size` bytes; the kernel closes descriptors that come with them."""
        data = b""
        while len(data) < size:
            self._wait_until(deadline)
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError(0, "it has closed the connection")
            data += part
        return data

    def _wait_until(self, deadline: float) -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))

    def close(self) -> None:
        """Close the connection, which lets most back ends end. Harmless twice."""
        if self.inherited:
            self._socket.close()
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends a wait for a reply in another thread
        with self._lock:
            self._socket.close()
