"""Directories of running machines: who has a name, and where its socket is.

A machine holds a lock in its directory as long as it lives, so that the directory of one that was
killed is known to be stale, and is taken over or removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError

__all__ = [
    "MachineDirectory",
    "MachineNameError",
    "RuntimeDirectoryError",
    "names_of_running",
    "runtime_root",
    "socket_of",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
_LOCK: Final = "lock"
_SOCKET: Final = "control"
_LONGEST_PATH: Final = 107  # of a socket (unix(7))


class MachineNameError(PykvmError):
    """A name that no machine can have, or that another one has, or that none has."""


class RuntimeDirectoryError(PykvmError):
    """A directory for sockets that is somebody else's, or cannot be made."""


def runtime_root() -> Path:
    """Return the user's directory of machines, `$XDG_RUNTIME_DIR/pykvm` or `/tmp/pykvm-UID`.

    Raises:
        RuntimeDirectoryError: it cannot be made, or somebody else could change it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "pykvm" if base else Path("/tmp") / f"pykvm-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise RuntimeDirectoryError(
            f"{root} cannot be used: {error.strerror}", "set XDG_RUNTIME_DIR to your own directory"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeDirectoryError(
            f"{root} is not this user's alone", f"remove it, or type chmod 700 {root}"
        )
    return root


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise MachineNameError(
            f"{name[:60]!r} is no name of a machine",
            "use up to 48 letters, digits, and . _ - behind the first",
        )
    return name


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def names_of_running() -> list[str]:
    """Return the names of this user's running machines; remove what killed ones have left."""
    found = []
    for place in sorted(runtime_root().iterdir()):
        try:
            descriptor = os.open(place / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # just being made or removed
        try:
            if _is_locked(descriptor):
                found.append(place.name)
            else:
                shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(descriptor)
    return found


def socket_of(name: str) -> Path:
    """Return the socket of a running machine.

    Raises:
        MachineNameError: no machine of this user has the name.
    """
    running = names_of_running()
    if _checked(name) not in running:
        known = f"running: {', '.join(running)}" if running else "none is running: pykvm run"
        raise MachineNameError(f"no machine {name} is running", known)
    return runtime_root() / name / _SOCKET


class MachineDirectory(Closeable):
    """The directory of a machine of this process.

    Attributes:
        name: the machine's name.
        path: the directory.

    Args:
        name: a name of the user's choice; None for the first free one of vm1, vm2, ...

    Raises:
        MachineNameError: it is no name, or another machine has it.
        RuntimeDirectoryError: see `runtime_root`.
    """

    def __init__(self, name: str | None = None) -> None:
        root = runtime_root()
        if name is not None:
            lock = self._take(root / _checked(name))
            if lock is None:
                raise MachineNameError(
                    f"a machine {name} is running", f"choose another --name, or: pykvm stop {name}"
                )
            self.path = root / name
        else:
            number = 1
            while (lock := self._take(root / f"vm{number}")) is None:
                number += 1
            self.path = root / f"vm{number}"
        self.name = self.path.name
        self._lock: int = lock
        if len(os.fsencode(self.socket)) > _LONGEST_PATH:
            self.close()
            raise RuntimeDirectoryError(
                f"{root} is too long for the name of a socket",
                "set XDG_RUNTIME_DIR to a shorter one",
            )

    @property
    def socket(self) -> Path:
        """Path of the machine's control socket."""
        return self.path / _SOCKET

    @staticmethod
    def _take(path: Path) -> int | None:
        """Make a directory one's own, also a stale one; return its lock, None if it is in use."""
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            try:
                descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # removed in between, as a stale one
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.samestat(os.fstat(descriptor), os.stat(path / _LOCK))
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                same = False
            if same:
                for left in path.iterdir():
                    if left.name != _LOCK:
                        left.unlink()
                return descriptor
            os.close(descriptor)

    def close(self) -> None:
        """Give the name back. Harmless twice."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        if not self.inherited:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(lock)
