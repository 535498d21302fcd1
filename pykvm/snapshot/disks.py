"""Disks of a snapshot, which are named and not copied: a changed one is refused.

A guest keeps parts of its file systems in memory. Restored over other contents, it would destroy
them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pykvm.errors import PykvmError

__all__ = ["DiskChangedError", "SavedDisk"]


class DiskChangedError(PykvmError):
    """A disk that is not as it was when the snapshot was made."""


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """A disk as it was.

    Attributes:
        name: the machine's name for it.
        path: where it was, absolute.
        size: bytes.
        modified: time of its last change, in ns; None for a block device, which has none.
    """

    name: str
    path: str
    size: int
    modified: int | None

    @classmethod
    def of(cls, name: str, path: Path) -> SavedDisk:
        """Return a disk as it is now.

        Raises:
            OSError: it cannot be opened.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            size = os.lseek(fd, 0, os.SEEK_END)  # a block device has no st_size
        finally:
            os.close(fd)
        modified = None if stat.S_ISBLK(found.st_mode) else found.st_mtime_ns
        return cls(name, str(path.absolute()), size, modified)

    @classmethod
    def from_values(cls, values: Any) -> SavedDisk:
        """Return the disk that JSON describes.

        Raises:
            ValueError: it describes none.
        """
        if not isinstance(values, dict) or values.keys() != set(cls.__slots__):
            raise ValueError("not the fields of a disk")
        disk = cls(**values)
        if not isinstance(disk.name, str) or not isinstance(disk.path, str) or "\0" in disk.path:
            raise ValueError("no name, or no path")
        if not isinstance(disk.size, int) or not isinstance(disk.modified, int | None):
            raise ValueError("no size, or no time")
        return disk

    def to_values(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return asdict(self)

    def require_unchanged(self) -> None:
        """Check that the disk is there as it was.

        Raises:
            DiskChangedError: it is not.
        """
        try:
            now = SavedDisk.of(self.name, Path(self.path))
        except OSError as error:
            raise DiskChangedError(
                f"disk {self.path} of the snapshot cannot be opened "
                f"({os.strerror(error.errno or 0).lower()})",
                "put it back where it was",
            ) from error
        if now.size != self.size or now.modified != self.modified:
            what = "size" if now.size != self.size else "time of its last change"
            raise DiskChangedError(
                f"disk {self.path} has changed since the snapshot was made: its {what} is another",
                "restore the disk as it was, or boot the machine anew",
            )
