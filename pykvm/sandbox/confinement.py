"""Permissions that a confined process keeps."""

from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = ["Confinement", "SandboxError"]


class SandboxError(PykvmError):
    """A confinement that Linux refuses. Some threads may be confined already: end the process."""


@dataclass(frozen=True)
class Confinement:
    """Permissions of a confined process, beside the use of what it has open.

    Attributes:
        directory: a directory of its own. It may change everything in it, and remove it. Landlock
            then lets it remove other empty directories beside it too.
        writable: further directories in which it may change everything.
        readable: files and directories that it may read, beside Python's and the C library's own.
        families: address families of sockets that it may make, such as ``socket.AF_UNIX``, which
            it may then connect to whatever this user may. Sockets that are open, and what a
            listening one accepts, need none.
        children: IDs of processes that it may send signals to. Where there is a descriptor
            (``os.pidfd_open``) it needs none.
        io_uring: whether it may use io_uring. What a ring does passes the filter of system calls,
            so Landlock alone remains for it.

    Raises:
        ValueError: a number is negative.
    """

    directory: Path | None = None
    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    families: tuple[int, ...] = ()
    children: tuple[int, ...] = ()
    io_uring: bool = False

    def __post_init__(self) -> None:
        # 0 and negative numbers are groups of processes: kill(2).
        if min(self.children, default=1) <= 0 or min(self.families, default=0) < 0:
            raise ValueError("processes have numbers above 0, families from 0 on")

    @property
    def changes_files(self) -> bool:
        """Whether it may change any file by its name."""
        return self.directory is not None or bool(self.writable)
