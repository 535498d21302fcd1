"""Reads the folder of a snapshot, and checks it (`pykvm.snapshot.folder`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory, RegionOverlapError
from pykvm.memory.regions import RegionError
from pykvm.snapshot import memory as memory_file
from pykvm.snapshot.disks import SavedDisk
from pykvm.snapshot.folder import (
    CHECKSUM,
    FORMAT,
    KIND,
    MANIFEST,
    MEMORY,
    Contents,
    NotASnapshotError,
    SnapshotDamagedError,
    SnapshotMissingError,
    SnapshotVersionError,
    may_be_named,
)
from pykvm.snapshot.memory import SavedRegion

__all__ = ["Snapshot"]

_LONGEST: Final = 64 << 20  # bytes of a manifest: 64 vCPUs take 2 MiB


class Snapshot(Closeable):
    """A snapshot's folder, open and checked.

    Attributes:
        path: the folder.
        contents: what it holds; blobs are read by `blob`.
        regions: where memory lies in its file.

    Args:
        path: the folder.

    Raises:
        SnapshotMissingError: there is none, or it may not be read.
        NotASnapshotError: it holds something else.
        SnapshotVersionError: it has another format.
        SnapshotDamagedError: something is missing, too short, too long, or has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, int] = {}
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SnapshotMissingError(
                f"no snapshot at {path} ({os.strerror(error.errno or 0).lower()})",
                "give the folder that a snapshot was written to",
            ) from error
        try:
            self._read_manifest()
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> None:
        text = self._read(
            MANIFEST,
            NotASnapshotError(
                f"{self.path} is not a snapshot: it has no {MANIFEST}",
                "give the folder that a snapshot was written to",
            ),
        )
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"{MANIFEST} is no json") from error
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            raise NotASnapshotError(
                f"{self.path} is not a snapshot: its {MANIFEST} is of something else",
                "give the folder that a snapshot was written to",
            )
        found = manifest.get("format")
        if found != FORMAT or isinstance(found, bool):
            raise SnapshotVersionError(
                f"{self.path} has format {found!r}, and this pykvm reads {FORMAT}",
                f"restore it with the pykvm that wrote it ({manifest.get('pykvm')!r})",
            )
        stated = self._read(CHECKSUM, self._damaged(f"{CHECKSUM} is missing")).split()[:1]
        if stated != [hashlib.sha256(text).hexdigest().encode()]:
            raise self._damaged(f"{MANIFEST} does not match its checksum")
        try:
            self._take(manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{MANIFEST} lacks something") from error

    def _take(self, manifest: dict[str, Any]) -> None:
        parts = [manifest[name] for name in ("machine", "kvm", "devices", "files")]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
        machine, kvm, devices, files = parts
        disks = [SavedDisk.from_values(disk) for disk in manifest["disks"]]
        self.regions = [SavedRegion.from_values(region) for region in manifest["memory"]]
        if files[MEMORY] != memory_file.memory_size(self.regions):
            raise ValueError
        for name, size in files.items():
            if name != MEMORY and not may_be_named(name):
                raise ValueError
            fd = self._files[name] = self._open(name, self._damaged(f"{name} is missing"))
            if (length := os.fstat(fd).st_size) != size:
                raise self._damaged(f"{name} has {length} bytes in place of {size}")
        self.contents = Contents(machine, kvm, devices, disks)

    def _damaged(self, what: str) -> SnapshotDamagedError:
        return SnapshotDamagedError(
            f"the snapshot {self.path} is damaged: {what}", "use another copy of it"
        )

    def _open(self, name: str, absent: PykvmError) -> int:
        """Open a regular file of the folder; a link leads out of it, and is refused."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._folder)
        except OSError as error:
            raise absent from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise absent
        return fd

    def _read(self, name: str, absent: PykvmError) -> bytes:
        with open(self._open(name, absent), "rb") as file:
            data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise self._damaged(f"{name} is too long")
        return data

    def blob(self, name: str) -> bytes:
        """Return one of the blobs.

        Raises:
            SnapshotDamagedError: there is none of that name.
        """
        if name not in self._files:
            raise self._damaged(f"{name} is missing")
        with open(os.dup(self._files[name]), "rb") as file:
            file.seek(0)
            return file.read()

    def map_memory(self) -> GuestMemory:
        """Return the guest's memory, read from the folder when it is used.

        The folder must stay as it is until the memory is closed; see
        `pykvm.snapshot.memory.map_memory`.

        Raises:
            SnapshotDamagedError: the regions are none.
            MemoryTooSmallError: there is no address space.
        """
        with self._regions_checked():
            return memory_file.map_memory(self._files[MEMORY], self.regions)

    def copy_memory(self, *, huge_page: int | None = None) -> GuestMemory:
        """Return a copy of the guest's memory, which other processes can map.

        Args:
            huge_page: page size, see `pykvm.memory.regions.MemoryFile`.

        Raises:
            SnapshotDamagedError: the regions are none, or the file cannot be read.
            MemoryTooSmallError: there is not enough memory.
            HugePagesError: there are not enough huge pages.
        """
        with self._regions_checked():
            return memory_file.copy_memory(self._files[MEMORY], self.regions, huge_page=huge_page)

    @contextlib.contextmanager
    def _regions_checked(self) -> Iterator[None]:
        try:
            yield
        except (RegionError, RegionOverlapError) as error:
            raise self._damaged(f"its memory cannot be mapped ({error.problem})") from error
        except OSError as error:
            raise self._damaged(
                f"its memory cannot be read ({os.strerror(error.errno or 0).lower()})"
            ) from error

    def close(self) -> None:
        """Close the folder; memory that was mapped stays. Harmless twice."""
        files, self._files = self._files, {}
        folder, self._folder = self._folder, -1
        for fd in files.values():
            os.close(fd)
        if folder >= 0:
            os.close(folder)
