"""Guest physical memory: the regions that one VM sees, addressed by GPA.

A `MemoryFile` owns the memory; a `Region` maps a part of it at a guest physical address; a
`GuestMemory` is the set of regions that one VM sees. The same file can lie in several guests::

    with MemoryFile("windows", 8 * MIB) as file, GuestMemory.create(64 * MIB) as memory:
        memory.add(Region(file, gpa=4 * GIB, offset=2 * MIB, size=4096))
        memory.write(0x1000, b"hello")
        for slot in memory.slots():
            vm.set_memory_slot(slot)
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.memory.regions import AddressError, ClosedMemoryError, MemoryFile, Region

__all__ = ["GuestMemory", "MemorySlot", "RegionOverlapError"]


class RegionOverlapError(PykvmError, ValueError):
    """A region over another one."""


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
        shareable: bool = False,
    ) -> Self:
        """Create memory of `size` bytes from `gpa` on, in a file of its own.

        Args:
            size: bytes.
            gpa: guest physical address of the first byte.
            name: name of the file, shown in /proc/PID/maps.
            huge_page: page size, see `MemoryFile`.
            prefault: whether to allocate every page now.
            shareable: see `Region`.

        Raises:
            RegionError: an address or size is not valid.
            HugePagesError: there are not enough huge pages.
            MemoryTooSmallError: there is not enough memory.
        """
        memory = cls()
        with MemoryFile(name, size, huge_page=huge_page) as file:
            memory.add(Region(file, gpa, prefault=prefault, shareable=shareable))
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
