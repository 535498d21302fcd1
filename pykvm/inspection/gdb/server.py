"""`GdbServer`: listens for GDB on a Unix socket or a port of this machine.

`serve_client` serves a connection that came another way, such as through a control socket.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.inspection.gdb.session import Session
from pykvm.inspection.machine import Inspectable

__all__ = ["GdbServer", "GdbServerError", "serve_client"]

_CHUNK: Final = 65536
_SEND_TIMEOUT: Final = 10.0  # seconds until a client that reads nothing is given up
_MOST_CLIENTS: Final = 4  # one is served, the others wait to be refused
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


def serve_client(machine: Inspectable, connection: socket.socket) -> None:
    """Serve GDB on a connection until it detaches or vanishes, or the machine ends.

    The machine stands until the client lets it run. A client that detaches, vanishes or sends
    rubbish leaves the machine running, without breakpoints. While another debugger is attached the
    client gets no answer. The caller closes the connection; shutting it down ends the call.
    """
    connection.settimeout(_SEND_TIMEOUT)
    # PykvmError: the client is done, or no debugger; or the machine cannot be stopped.
    with _Waker() as waker, suppress(PykvmError, OSError):
        session = Session(machine, connection.sendall, waker.wake)
        try:
            _converse(connection, session, waker)
        finally:
            session.close()


class _Waker(Closeable):
    """A pipe that wakes the thread of a session. Others may wake it even after it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(self) -> None:
        with self._lock, suppress(BlockingIOError):  # it is full: the thread will wake
            if self._write_end >= 0:
                os.write(self._write_end, b"\0")

    def close(self) -> None:
        with self._lock:
            os.close(self._write_end)
            self._write_end = -1
        os.close(self.read_end)


def _converse(connection: socket.socket, session: Session, waker: _Waker) -> None:
    while True:
        ready, _, _ = select.select([connection.fileno(), waker.read_end], [], [])
        if waker.read_end in ready:
            os.read(waker.read_end, _CHUNK)
            session.tell()
        if connection.fileno() in ready:
            data = connection.recv(_CHUNK)
            if not data:
                return
            session.feed(data)


class GdbServer(Closeable):
    """A stub that serves one client after the other (`serve_client`) in threads of its own.

    Args:
        machine: the machine.
        listener: a listening socket, which the server closes.
        path: the socket's file, which the server removes.
    """

    def __init__(
        self, machine: Inspectable, listener: socket.socket, path: Path | None = None
    ) -> None:
        self._machine = machine
        self._listener = listener
        self._address = str(path or "{}:{}".format(*listener.getsockname()))
        self._path = path
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="gdb", daemon=True)
        self._thread.start()

    @classmethod
    def on_unix_socket(cls, machine: Inspectable, path: Path) -> GdbServer:
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
    def on_port(cls, machine: Inspectable, port: int) -> GdbServer:
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
        """Argument of GDB's `target remote`."""
        return self._address

    def close(self) -> None:
        """Drop the client, let the machine run, and listen no more. Harmless twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clients = dict(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for client, thread in clients.items():
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            thread.join()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                # Closed, or no descriptor is left: the client waits then.
                if not self._closed:
                    threading.Event().wait(_PAUSE)
                continue
            thread = threading.Thread(target=self._serve, args=(client,), name="gdb", daemon=True)
            with self._lock:
                refused = self._closed or len(self._clients) >= _MOST_CLIENTS
                if not refused:
                    self._clients[client] = thread
            if refused:
                client.close()
            else:
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if client.family == socket.AF_INET:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serve_client(self._machine, client)
        finally:
            with self._lock:
                del self._clients[client]
            client.close()


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
