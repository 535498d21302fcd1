"""A vhost-user back end as a process of ours: its start, its last words and its end.

Nobody else can connect to it: its socket has lost its name before it runs. It is stopped with this
process, however this process ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio._vhost import ffi, lib
from pykvm.devices.virtio.vhost_user_connection import (
    REPLY_SECONDS,
    BackendError,
    VhostUserConnection,
)

__all__ = ["LISTENER", "BackendMissingError", "BackendProcess", "BackendStartError"]

LISTENER: Final[int] = lib.BACKEND_LISTENER
"""The back end's descriptor of the socket on which it has to listen."""

_TAIL: Final = 4096
_END_SECONDS: Final = 2.0
"""Seconds that a process may take to end after it has closed its connection."""


class BackendMissingError(BackendError):
    """A program that is not installed.

    Args:
        program: its name.
        package: of Debian 13, and later, that has it.
        older: of Debian 12.
    """

    def __init__(self, program: str, package: str, older: str) -> None:
        from pykvm.host import advice, debian_packages  # noqa: PLC0415  (only where it is missing)

        # QEMU has given its virtiofsd up since, and Debian 13 has a package of this name.
        later = not debian_packages.has_lists() or debian_packages.known_versions(["virtiofsd"])
        super().__init__(
            f"{program} is not installed", advice.install([package if later else older])
        )


class BackendStartError(BackendError):
    """A process that cannot be started."""


class BackendProcess(Closeable):
    """A process that serves one vhost-user connection.

    Args:
        name: the program in messages.
        command: its file and its arguments. It listens on descriptor `LISTENER`.
        read_only: whether it finds every file system read-only. That takes a mount namespace: of
            root, or of an ordinary user's own user namespace.
        user_namespace: whether it runs as root of a user namespace that has this user alone.
        patience: seconds that it may take to end when it is told to, before it is killed.
        timeout: seconds that each of its replies may take.

    Attributes:
        connection: the connection, which explains its errors by the process's end.

    Raises:
        BackendStartError: there can be no further process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        read_only: bool = False,
        user_namespace: bool = False,
        patience: float = 10.0,
        timeout: float = REPLY_SECONDS,
    ) -> None:
        self._name = name
        self._patience = patience
        self._said = b""
        self._status: int | None = None
        self._pid = 0
        self._process = -1
        self._started = threading.Event()
        self._ended = threading.Event()
        listener, client = _socket_pair()
        self.connection = VhostUserConnection(client, name, timeout)
        self.connection.explain = self.end
        flags = lib.BACKEND_READ_ONLY if read_only else 0
        flags |= lib.BACKEND_USER_NAMESPACE if user_namespace else 0
        # A process is stopped at the end of the *thread* that has started it, so this one waits.
        self._thread = threading.Thread(
            target=self._run, args=(list(command), listener, flags), name=name, daemon=True
        )
        self._thread.start()
        self._started.wait()
        listener.close()
        if self._pid < 0:
            self.connection.close()
            raise BackendStartError(
                f"{name} cannot be started ({os.strerror(-self._pid).lower()})",
                "end some processes, or raise the limit with `ulimit -u`",
            )

    @property
    def pid(self) -> int:
        """Its process ID; of the past if it has ended."""
        return self._pid

    def _run(self, command: list[str], listener: socket.socket, flags: int) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        arguments = [ffi.new("char[]", os.fsencode(one)) for one in command]
        argv = ffi.new("char *[]", [*arguments, ffi.NULL])
        self._pid = lib.backend_spawn(argv, listener.fileno(), write, flags)
        os.close(write)
        if self._pid > 0:
            self._process = os.pidfd_open(self._pid)
        self._started.set()
        if self._pid > 0:
            while part := os.read(read, _TAIL):  # until it and all its children have ended
                self._said = (self._said + part)[-_TAIL:]
            try:
                _, self._status = os.waitpid(self._pid, 0)
            except ChildProcessError:  # this process ignores SIGCHLD
                self._status = 0
            self._ended.set()
        os.close(read)

    def end(self, seconds: float = _END_SECONDS) -> str:
        """Return how the process has ended, in a line; "" if it still runs after `seconds`."""
        if not self._ended.wait(seconds):
            return ""
        assert self._status is not None
        code = os.waitstatus_to_exitcode(self._status)
        lines = self._said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        last = "".join(one for one in last[:200] if one.isprintable())
        how = f"has ended with status {code}"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"{self._name} {how}" + (f" ({last})" if last else "")

    def close(self) -> None:
        """End the process. Harmless twice."""
        self.connection.close()
        process, self._process = self._process, -1
        if process < 0:
            return
        if not self.inherited:
            self._signal(process, signal.SIGTERM)
            if not self._ended.wait(self._patience):
                self._signal(process, signal.SIGKILL)
            self._thread.join()
        os.close(process)

    def _signal(self, process: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return a listening socket, and one that waits to be accepted there before anybody else."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with tempfile.TemporaryDirectory(prefix="pykvm-") as directory:
            path = os.fspath(Path(directory, "socket"))
            listener.bind(path)
            listener.listen(1)
            client.connect(path)
    except BaseException:
        listener.close()
        client.close()
        raise
    return listener, client
