"""Guest memory in a sparse file, and back again.

All regions lie in one file, one after the other. Holes of the guest's memory, and blocks of
zeros, are holes of the file.

There are two ways back. `map_memory` maps the file: it takes no time, pages are read when the guest
first uses them, and what it writes stays in memory. `copy_memory` reads the file into memory that
other processes can map as well, which vhost-user needs.

Source: lseek(2), SEEK_DATA; Linux mm/shmem.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import HUGE_2M, MemoryFile, Region
from pykvm.sizes import KIB, MIB, PAGE_SIZE

__all__ = [
    "SavedRegion",
    "copy_memory",
    "map_memory",
    "memory_size",
    "place_regions",
    "save_memory",
]

_BLOCK: Final = 64 * KIB
_MOST_AT_ONCE: Final = 4 * MIB

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ZEROS: Final = (ctypes.c_char * _BLOCK)()


@dataclass(frozen=True, slots=True)
class SavedRegion:
    """A region's place in the file.

    Attributes:
        name: the region's.
        gpa: guest physical address of its first byte.
        size: bytes.
        offset: of its first byte in the file.
        read_only: whether the guest may only read.
    """

    name: str
    gpa: int
    size: int
    offset: int
    read_only: bool

    @classmethod
    def from_values(cls, values: Any) -> SavedRegion:
        """Return the region that JSON describes.

        Raises:
            ValueError: it describes none.
        """
        if not isinstance(values, dict) or values.keys() != set(cls.__slots__):
            raise ValueError("not the fields of a region")
        region = cls(**values)
        numbers = (region.gpa, region.size, region.offset)
        if not isinstance(region.name, str) or not isinstance(region.read_only, bool):
            raise ValueError("no name, or no flag")
        if any(not isinstance(n, int) or not 0 <= n < 1 << 52 or n % PAGE_SIZE for n in numbers):
            raise ValueError("not whole pages")
        if not region.size or "\0" in region.name:
            raise ValueError("an empty region, or a name that is none")
        return region

    def to_values(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return asdict(self)


def place_regions(memory: GuestMemory) -> list[SavedRegion]:
    """Return the places of a guest's regions in a file."""
    placed, offset = [], 0
    for region in memory.regions:
        placed.append(SavedRegion(region.name, region.gpa, region.size, offset, region.read_only))
        offset += -(-region.size // HUGE_2M) * HUGE_2M
    return placed


def memory_size(places: Iterable[SavedRegion]) -> int:
    """Return the length of the file."""
    return max((place.offset + place.size for place in places), default=0)


def save_memory(memory: GuestMemory, fd: int) -> int:
    """Write a guest's memory to a new file, at the places that `place_regions` returns.

    Nobody may write to the memory meanwhile. Regions that are not shareable are read throughout,
    which allocates the pages that they lack.

    Returns:
        The bytes that are not holes in the file.

    Raises:
        OSError: the file cannot be written, e.g. the disk is full.
    """
    written = 0
    places = place_regions(memory)
    os.ftruncate(fd, memory_size(places))
    for region, place in zip(memory.regions, places, strict=True):
        with region.view() as view:
            for start, end in _used(region, _data(region)):
                _write(fd, view[start:end], place.offset + start)
                written += end - start
    return written


def _data(region: Region) -> Iterator[tuple[int, int]]:
    """Yield the parts of a region for which its file has pages."""
    if not region.shareable:
        yield 0, region.size
        return
    yield from (
        (start - region.offset, end - region.offset)
        for start, end in _file_data(region.fd, region.offset, region.offset + region.size)
    )


def _file_data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file between two offsets that are not holes."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole follows
                raise
            return
        if start >= end:
            return
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, stop
        start = stop


def _used(region: Region, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield those blocks of parts that hold anything but zeros, adjacent ones as one."""
    compare, address = _libc.memcmp, region.host_address
    for first, end in parts:
        begun = first
        for at in range(first, end, _BLOCK):
            size = min(_BLOCK, end - at)
            if not compare(address + at, _ZEROS, size):
                if begun < at:
                    yield begun, at
                begun = at + size
            elif at + size - begun >= _MOST_AT_ONCE:
                yield begun, at + size
                begun = at + size
        if begun < end:
            yield begun, end


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def map_memory(fd: int, places: Sequence[SavedRegion], name: str = "snapshot") -> GuestMemory:
    """Return guest memory that is a private copy of a file, read when it is used.

    The file must stay as it is while the memory is used: a page that nobody has written follows the
    file, and a file that becomes shorter kills this process (SIGBUS).

    Args:
        fd: descriptor of the file, which is duplicated.
        places: where the regions are in it.
        name: shown in messages.

    Raises:
        RegionError: the file is too small.
        RegionOverlapError: regions overlap.
        MemoryTooSmallError: there is no address space.
    """
    memory = GuestMemory()
    try:
        with MemoryFile.of(os.dup(fd), name) as file:
            for place in places:
                region = Region(
                    file,
                    place.gpa,
                    offset=place.offset,
                    size=place.size,
                    read_only=place.read_only,
                    private=True,
                )
                region.name = place.name
                _add(memory, region)
    except BaseException:
        memory.close()
        raise
    return memory


def copy_memory(
    fd: int, places: Sequence[SavedRegion], *, huge_page: int | None = None
) -> GuestMemory:
    """Return guest memory of its own, shareable, with the contents of a file.

    Args:
        fd: descriptor of the file.
        places: where the regions are in it.
        huge_page: page size, see `MemoryFile`.

    Raises:
        RegionOverlapError: regions overlap.
        MemoryTooSmallError: there is not enough memory.
        HugePagesError: there are not enough huge pages.
        OSError: the file cannot be read.
    """
    memory = GuestMemory()
    try:
        for place in places:
            with MemoryFile(place.name, place.size, huge_page=huge_page) as file:
                region = Region(file, place.gpa, read_only=place.read_only, shareable=True)
            _add(memory, region)
            with region.view() as view:
                for start, end in _file_data(fd, place.offset, place.offset + place.size):
                    _read(fd, view[start - place.offset : end - place.offset], start)
    except BaseException:
        memory.close()
        raise
    return memory


def _add(memory: GuestMemory, region: Region) -> None:
    try:
        memory.add(region)
    except BaseException:
        region.close()
        raise


def _read(fd: int, target: memoryview, offset: int) -> None:
    while target:
        done = os.preadv(fd, [target], offset)
        if not done:
            raise OSError(errno.EIO, "the file has become shorter")
        target, offset = target[done:], offset + done
