"""A virtio block device over a raw file or a block device of the host.

The file is locked while the device has it (an OFD lock on all of it: for writing, or shared for
reading), so that no two machines write it, and none reads what another writes.

Source: VIRTIO 1.2, 5.2; fcntl(2); Linux drivers/block/virtio_blk.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.loop import NATIVE_FEATURES, NativeDevice
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Block", "BlockCounters", "DiskError", "DiskFile", "DiskInUseError"]

SECTOR: Final = lib.BLOCK_SECTOR

_F_SEG_MAX: Final = 1 << 2
_F_RO: Final = 1 << 5
_F_BLK_SIZE: Final = 1 << 6
_F_FLUSH: Final = 1 << 9
_F_TOPOLOGY: Final = 1 << 10
_F_DISCARD: Final = 1 << 13
_F_WRITE_ZEROES: Final = 1 << 14

_QUEUE_SIZE: Final = 256
_SEGMENTS: Final = _QUEUE_SIZE - 2
"""Of data in a request; header and status have a descriptor each."""

# ---- linux/fs.h: ioctls of block devices ----
_BLKSSZGET: Final = 0x1268
_BLKIOMIN: Final = 0x1278
_BLKIOOPT: Final = 0x1279
_BLKPBSZGET: Final = 0x127B


class DiskError(PykvmError):
    """A file that cannot be a disk."""


class DiskInUseError(DiskError):
    """A disk that another process has locked."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes that a guest should respect for speed."""

    logical: int = SECTOR
    physical: int = 4096
    smallest: int = 4096
    optimal: int = 0


@dataclass(frozen=True, slots=True)
class BlockCounters:
    """Totals of a block device. `waited`: requests that a thread of the pool has done."""

    reads: int
    writes: int
    flushes: int
    discards: int
    errors: int
    bytes_read: int
    bytes_written: int
    waited: int


class DiskFile:
    """An open and locked file or block device.

    Args:
        path: of the file.
        read_only: whether it is only read; others may read it as well then.

    Raises:
        DiskInUseError: another machine, or program, has locked it.
        DiskError: it is not there, or may not be opened, or its size is not a number of sectors.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self.fd = -1
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            # O_NONBLOCK: a FIFO would wait for a writer. It means nothing to what is accepted.
            self.fd = os.open(path, flags)
        except OSError as error:
            raise self._not_opened(error) from error
        try:
            self.size = self._size()
            self._lock()
            self.geometry = self._geometry()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, which unlocks it. Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _not_opened(self, error: OSError) -> DiskError:
        what = f"disk {self.path}: {os.strerror(error.errno or 0).lower()}"
        if error.errno == errno.ENOENT:
            return DiskError(what, f"make it: truncate --size 1G {self.path}")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not self.read_only:
            return DiskError(what, "attach it read-only, or make it writable")
        return DiskError(what, "name a file or block device that can be read")

    def _size(self) -> int:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise DiskError(
                f"disk {self.path} is neither a file nor a block device", "name one of these"
            )
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size % SECTOR:
            raise DiskError(
                f"disk {self.path} has {size} bytes, not a multiple of {SECTOR}",
                f"extend it: truncate --size %{SECTOR} {self.path}",
            )
        if not size:
            raise DiskError(f"disk {self.path} is empty", f"truncate --size 1G {self.path}")
        return size

    def _lock(self) -> None:
        kind = fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK
        # struct flock: type, whence, start, length (0: to the end), and no PID.
        wanted = struct.pack("@hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DiskInUseError(
                    f"disk {self.path} is in use by another process",
                    "stop that machine, use a copy, or attach it read-only in all of them",
                ) from error
            if error.errno not in (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise DiskError(
                f"disk {self.path}: its file system has no locks", "put it on a local file system"
            ) from error

    def _geometry(self) -> Geometry:
        if not stat.S_ISBLK(os.fstat(self.fd).st_mode):
            return Geometry()

        def ask(request: int) -> int:
            return int(struct.unpack("@i", fcntl.ioctl(self.fd, request, bytes(4)))[0])

        return Geometry(ask(_BLKSSZGET), ask(_BLKPBSZGET), ask(_BLKIOMIN), ask(_BLKIOOPT))


class Block(NativeDevice):
    """A disk of a guest.

    Attributes:
        on_error: called in a thread of its own when the host has refused a request ("no space left
            on device"); the guest sees an error for each.

    Args:
        disk: the file, which is closed with the device.
        id: what the guest finds as the serial number, at most 20 bytes.
        threads: that wait for the host's disk, at most 64; made when they are needed.

    Raises:
        DiskError: the identity is too long.
    """

    type = DeviceType.BLOCK
    queue_sizes = (_QUEUE_SIZE,)
    stateless = True
    on_error: Callable[[str], None]

    def __init__(
        self, memory: GuestMemory, disk: DiskFile, *, id: str = "", threads: int = 8
    ) -> None:
        identity = id.encode()
        if len(identity) > lib.BLOCK_ID_BYTES:
            raise DiskError(f"{id!r} as a disk's id", f"use at most {lib.BLOCK_ID_BYTES} bytes")
        if not 1 <= threads <= lib.BLOCK_MOST_THREADS:
            raise DiskError(f"{threads} threads for a disk", f"use 1 to {lib.BLOCK_MOST_THREADS}")
        self.disk = disk
        self.features = NATIVE_FEATURES | _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_TOPOLOGY
        self.features |= _F_RO if disk.read_only else _F_DISCARD | _F_WRITE_ZEROES
        self.on_error = lambda reason: None
        padded = identity.ljust(lib.BLOCK_ID_BYTES, b"\0")
        raw = lib.block_new(disk.fd, disk.size, disk.read_only, padded, threads)
        super().__init__(memory, "block", raw, lib.block_free)

    def config(self) -> bytes:
        geometry = self.disk.geometry
        ranges = lib.BLOCK_MOST_RANGES
        return struct.pack(
            "<QII4xIBBHIBxHIIIIIB3x",
            self.disk.size // SECTOR,
            0,  # bytes of a segment: F_SIZE_MAX is not offered
            _SEGMENTS,
            geometry.logical,
            (geometry.physical // geometry.logical).bit_length() - 1,
            0,
            geometry.smallest // geometry.logical,
            geometry.optimal // geometry.logical,
            1,  # writeback
            1,  # queues
            lib.BLOCK_DISCARD_SECTORS,
            ranges,
            geometry.physical // SECTOR,
            lib.BLOCK_ZEROES_SECTORS,
            ranges,
            1,  # write zeroes may unmap
        )

    def disk_files(self) -> Sequence[Path]:
        """Return the disk's file."""
        return (self.disk.path,)

    @property
    def counters(self) -> BlockCounters:
        """Totals since the device was made; of a closed one, nothing."""
        raw = ffi.new("struct block_counters *")
        with self._lock:
            if self._device is not None:
                lib.block_count(self._device, raw)
        return BlockCounters(*(getattr(raw, name) for name in BlockCounters.__slots__))

    def close(self) -> None:
        """Finish what was taken, and close the disk."""
        super().close()
        self.disk.close()

    def _noticed(self) -> None:
        with self._lock:
            error = 0 if self._device is None else lib.block_take_error(self._device)
        if error:
            self.on_error(f"disk {self.disk.path}: {os.strerror(error).lower()}")
