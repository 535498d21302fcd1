"""`GdbServer`: listens for GDB on a Unix socket or a port of this machine, one client at a time."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.inspect.gdb.session import Session
from pykvm.inspect.machine import Machine

__all__ = ["GdbServer", "GdbServerError"]

_CHUNK: Final = 65536
_SEND_TIMEOUT: Final = 10.0  # seconds until a client that reads nothing is given up
_PAUSE: Final = 0.1  # seconds
_LOCALHOST: Final = "127.0.0.1"


class GdbServerError(PykvmError):
    """A stub that cannot listen.

    Attributes:
        errno: the kernel's answer, if it was asked.
    """

    def __init__(self, problem: str, next_step: str, errno: int | None = None) -> None:
        super().__init__(problem, next_step)
        self.errno = errno


class GdbServer(Closeable):
    """A stub that serves one client after the other in a thread of its own.

    The machine stands while a client is connected, until that lets it run. A client that detaches,
    vanishes or sends rubbish leaves the machine running, without breakpoints.

    Args:
        machine: the machine.
        listener: a listening socket, which the server closes.
        path: the socket's file, which the server removes.
    """

    def __init__(self, machine: Machine, listener: socket.socket, path: Path | None = None) -> None:
        self._machine = machine
        self._listener = listener
        self._listener.setblocking(False)
        self._path = path
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    @classmethod
    def on_unix_socket(cls, machine: Machine, path: Path) -> GdbServer:
        """Listen on a Unix socket that only this user may connect to: `target remote PATH`.

        A socket that nobody listens on any more is replaced.

        Raises:
            GdbServerError: the path is in use, too long, or cannot be made.
        """
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Before bind(), so that there is no moment in which others may connect: Linux gives
            # the file the mode of the socket (net/unix/af_unix.c, unix_bind_bsd()).
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            listener.listen()
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            raise GdbServerError(
                f"no socket for gdb at {path}: {reason.lower()}", "give another path", error.errno
            ) from error
        return cls(machine, listener, path)

    @classmethod
    def on_port(cls, machine: Machine, port: int) -> GdbServer:
        """Listen on a TCP port of 127.0.0.1: `target remote :PORT`.

        Every user of this machine can connect, and then rules the guest.

        Args:
            machine: the machine.
            port: 1 to 65535, or 0 for one that is free.

        Raises:
            GdbServerError: the port is in use, or is none.
        """
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((_LOCALHOST, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            listener.close()
            reason = error.strerror if isinstance(error, OSError) else None
            raise GdbServerError(
                f"no port {port} for gdb: {(reason or str(error)).lower()}",
                "give another port",
                getattr(error, "errno", None),
            ) from error
        return cls(machine, listener)

    @property
    def address(self) -> str:
        """What to type after `target remote` in GDB."""
        if self._path is not None:
            return str(self._path)
        return f"{_LOCALHOST}:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Drop the client, let the machine run, and listen no more. Harmless twice."""
        if self._stopping:
            return
        self._stopping = True
        self._wake()
        self._thread.join()
        self._listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: the thread will wake
            os.write(self._wake_write, b"\0")

    # ---- the thread -------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._stopping:
            if self._listener.fileno() in self._ready() and (client := self._accept()):
                with client:
                    self._talk(client)

    def _accept(self) -> socket.socket | None:
        try:
            return self._listener.accept()[0]
        except BlockingIOError:
            return None  # it is gone already
        except OSError:
            time.sleep(_PAUSE)  # no descriptor is left; the client waits
            return None

    def _ready(self, *others: int) -> list[int]:
        """Wait until something happens; return the descriptors with news."""
        listener = self._listener.fileno()
        ready, _, _ = select.select([self._wake_read, listener, *others], [], [])
        if self._wake_read in ready:
            self._drain()
        if listener in ready:
            # A client that came after the last one had gone finds that one gone here.
            ready += select.select(others, [], [], 0)[0]
        return ready

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, _CHUNK)

    def _talk(self, client: socket.socket) -> None:
        client.settimeout(_SEND_TIMEOUT)
        if client.family == socket.AF_INET:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # PykvmError: the client is done, or no debugger; or the machine cannot be stopped.
        with contextlib.suppress(PykvmError, OSError):
            session = Session(self._machine, client.sendall, self._wake)
            try:
                self._converse(client, session)
            finally:
                session.close()

    def _converse(self, client: socket.socket, session: Session) -> None:
        while not self._stopping:
            ready = self._ready(client.fileno())
            session.tell()
            if client.fileno() in ready:
                data = client.recv(_CHUNK)
                if not data:
                    return
                session.feed(data)
            elif self._listener.fileno() in ready and (other := self._accept()):
                other.close()  # one at a time


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        GdbServerError: something else is there, or somebody listens.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise GdbServerError(f"{path} is there, and is no socket", "give another path")
    except OSError:
        return  # bind() will tell
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return
        else:
            raise GdbServerError(f"somebody listens on {path}", "stop that, or give another path")
