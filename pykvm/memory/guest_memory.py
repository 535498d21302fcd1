"""Guest physical memory: files of anonymous memory (memfd), mapped and addressed by GPA.

A `MemoryFile` owns the memory; a `Region` maps a part of it at a guest physical address; a
`GuestMemory` is the set of regions that one VM sees. The same file can lie in several guests::

    with MemoryFile("windows", 8 * MIB) as file, GuestMemory.create(64 * MIB) as memory:
        memory.add(Region(file, gpa=4 * GIB, offset=2 * MIB, size=4096))
        memory.write(0x1000, b"hello")
        for slot in memory.slots():
            vm.set_memory_slot(slot)

Sources: memfd_create(2), fcntl(2) for seals, Linux Documentation/admin-guide/mm/hugetlbpage.rst.
"""

import bisect
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "HUGE_1G",
    "HUGE_2M",
    "AddressError",
    "ClosedMemoryError",
    "GuestMemory",
    "HugePagesError",
    "LockLimitError",
    "MemoryFile",
    "MemorySlot",
    "MemoryTooSmallError",
    "Region",
    "RegionError",
    "RegionOverlapError",
    "lockable_bytes",
    "require_lockable",
]

HUGE_2M: Final = 1 << 21
HUGE_1G: Final = 1 << 30

_MADV_POPULATE_WRITE: Final = 23  # linux/mman.h, since Linux 5.14; not in the mmap module
_CAP_IPC_LOCK: Final = 14  # linux/capability.h


class AddressError(PykvmError, IndexError):
    """An address range that no region holds."""


class RegionError(PykvmError, ValueError):
    """A size, offset or address that cannot be mapped."""


class RegionOverlapError(PykvmError, ValueError):
    """A region over another one."""


class ClosedMemoryError(PykvmError, ValueError):
    """Use after close()."""


class MemoryTooSmallError(PykvmError, MemoryError):
    """Less memory in the machine than the guest needs."""


class HugePagesError(PykvmError, MemoryError):
    """A pool of huge pages that is too small, or a page size that is not supported."""


class LockLimitError(PykvmError, MemoryError):
    """A limit (RLIMIT_MEMLOCK) too low for the pages that the kernel has to pin."""


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """Arguments of KVM_SET_USER_MEMORY_REGION for one region.

    Attributes:
        number: slot number.
        gpa: guest physical address of the first byte.
        size: bytes.
        host_address: address of the first byte in this process.
        read_only: whether the guest may only read.
    """

    number: int
    gpa: int
    size: int
    host_address: int
    read_only: bool


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
            _require_memory(size, "MemTotal")
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

    @property
    def fd(self) -> int:
        """The memfd's descriptor.

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

    Raises:
        RegionError: an address or size is not aligned, or the file is too small.
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
    ) -> None:
        size = file.size - offset if size is None else size
        for what, value in (("gpa", gpa), ("offset", offset), ("size", size)):
            if value < 0 or value % file.page_size:
                raise RegionError(
                    f"{what} {value:#x} of a region in {file.name}",
                    f"use a multiple of {file.page_size:#x}",
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
        if prefault and file.page_size == PAGE_SIZE:
            _require_memory(size, "MemAvailable")
        try:
            self._map: mmap.mmap | None = mmap.mmap(file.fd, size, mmap.MAP_SHARED, offset=offset)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            if file.page_size != PAGE_SIZE:
                raise _huge_pages_error(file.page_size, size) from error
            limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
            raise MemoryTooSmallError(
                f"no address space for {size >> 10} KiB of guest memory",
                "raise the limit with `ulimit -v`"
                if limited
                else "unmap memory, or raise vm.max_map_count with sysctl",
            ) from error
        # The temporary array has to be gone before close() can unmap: it is an exported buffer.
        self._host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if prefault:
            try:
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
        if mapping is not None:
            # BufferError: there are views. They hold the mapping, which unmaps itself when they go.
            with contextlib.suppress(BufferError):
                mapping.close()

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


class GuestMemory(Closeable):
    """Memory of one VM: regions that do not overlap, addressed by GPA."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._starts: list[int] = []
        self._closed = False

    @classmethod
    def create(
        cls,
        size: int,
        *,
        gpa: int = 0,
        name: str = "guest",
        huge_page: int | None = None,
        prefault: bool = False,
    ) -> Self:
        """Create memory of `size` bytes from `gpa` on, in a file of its own.

        Args:
            size: bytes.
            gpa: guest physical address of the first byte.
            name: name of the file, shown in /proc/PID/maps.
            huge_page: page size, see `MemoryFile`.
            prefault: whether to allocate every page now.

        Raises:
            RegionError: an address or size is not valid.
            HugePagesError: there are not enough huge pages.
            MemoryTooSmallError: there is not enough memory.
        """
        memory = cls()
        with MemoryFile(name, size, huge_page=huge_page) as file:
            memory.add(Region(file, gpa, prefault=prefault))
        return memory

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions in order of their GPA."""
        return tuple(self._regions)

    @property
    def size(self) -> int:
        """Bytes in all regions."""
        return sum(region.size for region in self._regions)

    def add(self, region: Region) -> Region:
        """Take over a region: it is closed together with this memory.

        If the call fails, the region stays the caller's.

        Raises:
            RegionOverlapError: another region holds part of its addresses.
            ClosedMemoryError: this memory is closed.
        """
        if self._closed:
            raise ClosedMemoryError("guest memory is closed", "create it again")
        at = bisect.bisect_left(self._starts, region.gpa)
        for other in self._regions[max(at - 1, 0) : at + 1]:
            if region.gpa < other.end and other.gpa < region.end:
                raise RegionOverlapError(
                    f"{region.name} at {region.gpa:#x}-{region.end:#x} overlaps {other.name} at "
                    f"{other.gpa:#x}-{other.end:#x}",
                    "choose another gpa",
                )
        self._regions.insert(at, region)
        self._starts.insert(at, region.gpa)
        return region

    def remove(self, region: Region) -> None:
        """Remove a region and close it; delete the VM's memory slot first."""
        at = self._regions.index(region)
        del self._regions[at], self._starts[at]
        region.close()

    def region_at(self, gpa: int) -> Region:
        """Return the region that holds `gpa`.

        Raises:
            AddressError: no region does.
            ClosedMemoryError: this memory is closed.
        """
        if self._closed:
            raise ClosedMemoryError("guest memory is closed", "create it again")
        at = bisect.bisect_right(self._starts, gpa) - 1
        if at < 0 or gpa >= self._regions[at].end:
            raise AddressError(
                f"no guest memory at {gpa:#x}", f"use what the guest has: {self._describe()}"
            )
        return self._regions[at]

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view, not a copy, of `size` bytes at `gpa`, inside one region.

        Raises:
            AddressError: no single region holds all of them.
        """
        region = self.region_at(gpa)
        if size < 0 or gpa + size > region.end:
            raise AddressError(
                f"no {size:#x} bytes of guest memory at {gpa:#x}",
                f"stay below {region.end:#x}, where region {region.name} ends",
            )
        return region.view(gpa - region.gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of `size` bytes at `gpa`, which may lie in adjacent regions.

        Raises:
            AddressError: there is no guest memory at some of them.
        """
        return b"".join(bytes(view) for view in self._views(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`, which may lie in adjacent regions.

        Raises:
            AddressError: there is no guest memory for some of it; nothing is written then.
        """
        source = memoryview(data).cast("B")
        done = 0
        for view in self._views(gpa, len(source)):
            view[:] = source[done : done + len(view)]
            done += len(view)

    def host_address(self, gpa: int, size: int = 1) -> int:
        """Return the address in this process of `size` bytes at `gpa`, inside one region.

        Raises:
            AddressError: no single region holds all of them.
        """
        region = self.region_at(gpa)
        if gpa + size > region.end:
            raise AddressError(
                f"no {size:#x} bytes of guest memory at {gpa:#x}",
                f"stay below {region.end:#x}, where region {region.name} ends",
            )
        return region.host_address + gpa - region.gpa

    def slots(self, first: int = 0) -> Iterator[MemorySlot]:
        """Yield one KVM memory slot for each region, numbered from `first` on."""
        for number, region in enumerate(self._regions, first):
            yield MemorySlot(number, region.gpa, region.size, region.host_address, region.read_only)

    def close(self) -> None:
        """Close every region."""
        self._closed = True
        regions, self._regions, self._starts = self._regions, [], []
        for region in regions:
            region.close()

    def _views(self, gpa: int, size: int) -> list[memoryview]:
        if size < 0:
            raise AddressError(f"no {size} bytes of guest memory", "ask for 0 or more")
        views = []
        while size:
            region = self.region_at(gpa)
            part = min(size, region.end - gpa)
            views.append(region.view(gpa - region.gpa, part))
            gpa += part
            size -= part
        return views

    def _describe(self) -> str:
        return ", ".join(f"{r.gpa:#x}-{r.end:#x}" for r in self._regions) or "none"

    def __repr__(self) -> str:
        return f"<GuestMemory {self._describe()}>"


def lockable_bytes() -> int | None:
    """Return how many bytes this process may pin.

    Returns:
        RLIMIT_MEMLOCK, or None if it does not limit this process: it is unlimited, or the process
        has CAP_IPC_LOCK.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "CapEff" and int(value, 16) >> _CAP_IPC_LOCK & 1:
            return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def require_lockable(size: int) -> None:
    """Check that this process may pin `size` bytes.

    Raises:
        LockLimitError: it may not.
    """
    limit = lockable_bytes()
    if limit is not None and limit < size:
        raise LockLimitError(
            f"{_kib(size)} KiB have to be pinned and only {limit >> 10} KiB may be",
            f"type `ulimit -l {_kib(size)}` in a root shell, or run as root",
        )


def _kib(size: int) -> int:
    return -(-size >> 10)


def _require_memory(size: int, key: str) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key and size > int(value.split()[0]) << 10:
            raise MemoryTooSmallError(
                f"{_kib(size) >> 10} MiB of guest memory do not fit into "
                f"{int(value.split()[0]) >> 10} MiB ({key})",
                "give the guest less",
            )


def _huge_pages_error(page_size: int, size: int) -> HugePagesError:
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    need = size // page_size
    try:
        total = int((pool / "nr_hugepages").read_text())
        free = int((pool / "free_hugepages").read_text())
        free -= int((pool / "resv_hugepages").read_text())
    except OSError:
        return HugePagesError(
            f"this kernel has no pool of {page_size >> 20} MiB pages", "leave out huge_page"
        )
    # /proc/sys/vm/nr_hugepages is the pool of the default size, 2 MiB unless configured otherwise.
    default = f"Hugepagesize:{page_size >> 10:>15} kB"
    short = default.split() in [
        line.split() for line in Path("/proc/meminfo").read_text().splitlines()
    ]
    where = Path("/proc/sys/vm/nr_hugepages") if short else pool / "nr_hugepages"
    return HugePagesError(
        f"{need} huge pages of {page_size >> 20} MiB are needed and {free} are free",
        f"type `echo {total + need - free} > {where}` as root",
    )
