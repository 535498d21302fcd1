"""Files of anonymous memory (memfd), and parts of them mapped at guest physical addresses.

Sources: memfd_create(2), fcntl(2) for seals, Linux Documentation/admin-guide/mm/hugetlbpage.rst.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
from typing import Final, Self

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.memory.limits import (
    HugePagesError,
    MemoryTooSmallError,
    huge_pages_error,
    require_memory,
)
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "HUGE_1G",
    "HUGE_2M",
    "AddressError",
    "ClosedMemoryError",
    "MemoryFile",
    "Region",
    "RegionError",
]

HUGE_2M: Final = 1 << 21
HUGE_1G: Final = 1 << 30

_MADV_POPULATE_WRITE: Final = 23  # linux/mman.h, since Linux 5.14; not in the mmap module


class AddressError(PykvmError, IndexError):
    """An address range that no region holds."""


class RegionError(PykvmError, ValueError):
    """A size, offset or address that cannot be mapped."""


class ClosedMemoryError(PykvmError, ValueError):
    """Use after close()."""


class MemoryFile(Closeable):
    """Anonymous memory with a file descriptor, zeroed at first.

    Args:
        name: shown in /proc/PID/maps, at most 249 bytes.
        size: bytes, a multiple of the page size in use.
        huge_page: None for 4 KiB pages, `HUGE_2M` or `HUGE_1G`.
        sealed: whether the size is fixed for every holder of the descriptor. If it is not, another
            process can truncate the file, and SIGBUS kills this one at its next access.

    Raises:
        RegionError: the size or the page size is not valid.
        HugePagesError: the kernel has no huge pages of this size.
        MemoryTooSmallError: the machine has less memory.
    """

    def __init__(
        self, name: str, size: int, *, huge_page: int | None = None, sealed: bool = True
    ) -> None:
        self.name = name
        self.size = size
        self.page_size = huge_page or PAGE_SIZE
        self._fd = -1
        if huge_page not in (None, HUGE_2M, HUGE_1G):
            raise RegionError(f"no huge pages of {huge_page} bytes", "use HUGE_2M or HUGE_1G")
        if size <= 0 or size % self.page_size:
            raise RegionError(
                f"{size:#x} bytes for {name}", f"use a positive multiple of {self.page_size:#x}"
            )
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if huge_page:
            flags |= os.MFD_HUGETLB
            flags |= os.MFD_HUGE_2MB if huge_page == HUGE_2M else os.MFD_HUGE_1GB
        else:
            require_memory(size, "MemTotal")
        try:
            self._fd = os.memfd_create(name, flags)
        except OSError as error:
            if huge_page and error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOENT):
                raise HugePagesError(
                    f"this kernel has no huge pages of {huge_page >> 20} MiB", "leave out huge_page"
                ) from error
            raise
        try:
            os.ftruncate(self._fd, size)
            if sealed:
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
                fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, fd: int, name: str) -> Self:
        """Return an open file as memory, of whose pages a `Region` may map private copies.

        It owns the descriptor from now on. Whoever truncates the file meanwhile kills those who map
        it, with SIGBUS at their next access.

        Args:
            fd: descriptor of a file of whole pages.
            name: see `MemoryFile`.
        """
        file = cls.__new__(cls)
        file.name, file.size, file.page_size = name, os.fstat(fd).st_size, PAGE_SIZE
        file._fd = fd
        return file

    @property
    def fd(self) -> int:
        """The file's descriptor.

        Raises:
            ClosedMemoryError: the file is closed.
        """
        if self._fd < 0:
            raise ClosedMemoryError(f"memory file {self.name} is closed", "create it again")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; regions that map the file keep its memory."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<MemoryFile {self.name} {self.size:#x} bytes{' closed' * self.closed}>"


class Region(Closeable):
    """A part of a `MemoryFile`, mapped into this process and placed at a GPA.

    The region keeps the file's memory alive after the file is closed.

    Args:
        file: the file to map.
        gpa: guest physical address; a multiple of the file's page size, like `offset` and `size`.
        offset: first byte of the file that is mapped.
        size: bytes; by default the rest of the file.
        prefault: whether to allocate every page now, so that no page fault disturbs a measurement.
        read_only: whether the guest may only read; this process may always write.
        private: whether what is written stays out of the file, in copies of its pages. Pages are
            read from the file when they are first used.
        shareable: whether `fd` stays, so that other processes can map the region too.

    Raises:
        RegionError: an address or size is not aligned, or the file is too small; or a region is to
            be private and shareable.
        HugePagesError: the pool of huge pages is too small.
        MemoryTooSmallError: there is not enough memory or address space.
    """

    def __init__(
        self,
        file: MemoryFile,
        gpa: int,
        *,
        offset: int = 0,
        size: int | None = None,
        prefault: bool = False,
        read_only: bool = False,
        shareable: bool = False,
        private: bool = False,
    ) -> None:
        size = file.size - offset if size is None else size
        for what, value in (("gpa", gpa), ("offset", offset), ("size", size)):
            if value < 0 or value % file.page_size:
                raise RegionError(
                    f"{what} {value:#x} of a region in {file.name}",
                    f"use a multiple of {file.page_size:#x}",
                )
        if private and shareable:
            raise RegionError(
                f"private pages of {file.name} cannot be shared", "copy them into a file of memory"
            )
        if size == 0 or offset + size > file.size:
            raise RegionError(
                f"no {size:#x} bytes at offset {offset:#x} of {file.name}",
                f"stay within its {file.size:#x} bytes",
            )
        self.name = file.name
        self.gpa = gpa
        self.size = size
        self.offset = offset
        self.page_size = file.page_size
        self.read_only = read_only
        self._fd = -1
        if prefault and file.page_size == PAGE_SIZE:
            require_memory(size, "MemAvailable")
        if private:
            require_memory(size, "MemTotal")
        try:
            flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
            self._map: mmap.mmap | None = mmap.mmap(file.fd, size, flags, offset=offset)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            if file.page_size != PAGE_SIZE:
                raise huge_pages_error(file.page_size, size) from error
            limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
            raise MemoryTooSmallError(
                f"no address space for {size >> 10} KiB of guest memory",
                "raise the limit with `ulimit -v`"
                if limited
                else "unmap memory, or raise vm.max_map_count with sysctl",
            ) from error
        # The temporary array has to be gone before close() can unmap: it is an exported buffer.
        self._host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        try:
            if shareable:
                self._fd = fcntl.fcntl(file.fd, fcntl.F_DUPFD_CLOEXEC, 0)
            if prefault:
                self._prefault()
        except BaseException:
            self.close()
            raise

    @property
    def end(self) -> int:
        """One past the last GPA."""
        return self.gpa + self.size

    @property
    def host_address(self) -> int:
        """Address of the first byte in this process.

        Raises:
            ClosedMemoryError: the region is closed.
        """
        self._mapping()
        return self._host_address

    @property
    def fd(self) -> int:
        """Descriptor of the file, for another process, which finds the region at `offset`.

        Raises:
            RegionError: the region is not shareable.
            ClosedMemoryError: the region is closed.
        """
        self._mapping()
        if not self.shareable:
            raise RegionError(
                f"no other process can map region {self.name}", "make it with shareable=True"
            )
        return self._fd

    @property
    def shareable(self) -> bool:
        return self._fd >= 0

    @property
    def closed(self) -> bool:
        return self._map is None

    def view(self, start: int = 0, size: int | None = None) -> memoryview:
        """Return a writable view, not a copy, of `size` bytes from byte `start` of the region.

        A view stays valid after close(): the memory is unmapped when its last view goes.

        Raises:
            AddressError: the region has fewer bytes.
            ClosedMemoryError: the region is closed.
        """
        mapping = self._mapping()
        size = self.size - start if size is None else size
        if start < 0 or size < 0 or start + size > self.size:
            raise AddressError(
                f"no {size:#x} bytes at {start:#x} of region {self.name}",
                f"stay within its {self.size:#x} bytes",
            )
        return memoryview(mapping)[start : start + size]

    def close(self) -> None:
        """Unmap the region, or leave that to the last view in use."""
        mapping, self._map = self._map, None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if mapping is not None:
            # BufferError: there are views. They hold the mapping, which unmaps itself when they go.
            with contextlib.suppress(BufferError):
                mapping.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise ClosedMemoryError(f"region {self.name} is closed", "map it again")
        return self._map

    def _prefault(self) -> None:
        mapping = self._mapping()
        try:
            mapping.madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                # Before Linux 5.14. A read fault allocates a page of a memfd as well.
                bytes(memoryview(mapping)[:: self.page_size])
            elif error.errno in (errno.ENOMEM, errno.EFAULT):
                raise MemoryTooSmallError(
                    f"cannot allocate {self.size >> 20} MiB of guest memory now",
                    "free some or give the guest less",
                ) from error
            else:
                raise

    def __repr__(self) -> str:
        return f"<Region {self.name} {self.gpa:#x}-{self.end:#x}{' closed' * self.closed}>"
