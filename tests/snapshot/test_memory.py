"""pykvm.snapshot.memory: sparse files, and both ways back."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.limits import MemoryTooSmallError
from pykvm.memory.regions import MemoryFile, Region, RegionError
from pykvm.sizes import GIB, KIB, MIB
from pykvm.snapshot.memory import (
    SavedRegion,
    copy_memory,
    map_memory,
    memory_size,
    place_regions,
    save_memory,
)
from tests.rigs.messages import one_line

pytestmark = pytest.mark.unit


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def disk_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def allocated(memory: GuestMemory) -> int:
    return sum(disk_bytes(region.fd) for region in memory.regions)


def test_holes_and_zeros_take_no_space(file: int) -> None:
    with GuestMemory.create(GIB, shareable=True) as memory:
        memory.write(5 * MIB + 7, b"here")
        memory.write(300 * MIB, b"\1" * (9 * MIB) + b"\2")
        memory.write(700 * MIB, bytes(8 * MIB))  # pages of zeros
        memory.write(GIB - 4096, b"end")
        before = allocated(memory)
        written = save_memory(memory, file)
        assert allocated(memory) == before  # reading allocates nothing
        places = place_regions(memory)
        assert os.fstat(file).st_size == memory_size(places) == GIB
        assert 9 * MIB < written <= 9 * MIB + 4 * 64 * KIB
        # A file system may allocate some pages more, for its own purposes.
        assert disk_bytes(file) < 10 * MIB
        for back in (map_memory(file, places), copy_memory(file, places)):
            with back:
                assert back.read(5 * MIB, 16) == bytes(7) + b"here" + bytes(5)
                assert back.read(300 * MIB, 9 * MIB + 2) == b"\1" * (9 * MIB) + b"\2\0"
                assert back.read(GIB - 4096, 4) == b"end\0"
                assert not any(back.read(700 * MIB, 8 * MIB))


@pytest.mark.parametrize("shareable", [False, True])
def test_any_contents(file: int, shareable: bool) -> None:
    """Zeros and others at all sizes around those in which memory is compared and written."""
    with GuestMemory.create(32 * MIB, shareable=shareable) as memory:
        at = 0
        for length in (1, 4095, 4096, 65535, 65536, 65537, 4 * MIB, 4 * MIB + 1, 5 * MIB):
            memory.write(at, os.urandom(length))
            at += 2 * length + 4096
        save_memory(memory, file)
        contents = memory.read(0, 32 * MIB)
        places = place_regions(memory)
        for back in (map_memory(file, places), copy_memory(file, places)):
            with back:
                assert back.read(0, 32 * MIB) == contents


def test_several_regions(file: int) -> None:
    with GuestMemory() as memory, MemoryFile("windows", 4 * MIB) as windows:
        memory.add(Region(windows, 4 * GIB, offset=MIB, size=64 * KIB, shareable=True))
        memory.add(Region(windows, 8 * GIB, offset=3 * MIB, size=4096, read_only=True))
        with MemoryFile("ram", 3 * MIB) as ram:
            memory.add(Region(ram, 0, shareable=True))
        memory.write(4 * GIB + 64 * KIB - 4, b"last")
        memory.write(8 * GIB, b"low")
        memory.write(MIB, b"ram")
        # Another part of the file, which is not the guest's.
        with Region(windows, 0, offset=0, size=MIB) as foreign:
            foreign.view()[:] = b"\xee" * MIB
        save_memory(memory, file)
        places = place_regions(memory)
    assert disk_bytes(file) < MIB
    places = [SavedRegion.from_values(place.to_values()) for place in places]
    for back in (map_memory(file, places), copy_memory(file, places)):
        with back:
            assert [(region.name, region.gpa, region.size) for region in back.regions] == [
                ("ram", 0, 3 * MIB),
                ("windows", 4 * GIB, 64 * KIB),
                ("windows", 8 * GIB, 4096),
            ]
            assert [region.read_only for region in back.regions] == [False, False, True]
            assert back.read(4 * GIB + 64 * KIB - 4, 4) == b"last"
            assert (back.read(8 * GIB, 3), back.read(MIB, 3)) == (b"low", b"ram")


def test_a_mapped_file_stays_as_it_is(file: int) -> None:
    with GuestMemory.create(4 * MIB, shareable=True) as memory:
        memory.write(MIB, b"as it was")
        save_memory(memory, file)
        places = place_regions(memory)
    with map_memory(file, places) as one, map_memory(file, places) as other:
        one.write(MIB, b"changed!!")
        one.write(2 * MIB, b"new")
        assert other.read(MIB, 9) == b"as it was"
        assert os.pread(file, 9, MIB) == b"as it was"
        assert not one.regions[0].shareable
        # What a restored machine has written is saved with the rest.
        again = os.memfd_create("again")
        save_memory(one, again)
        assert os.pread(again, 9, MIB) == b"changed!!"
        assert os.pread(again, 3, 2 * MIB) == b"new"
        assert disk_bytes(again) <= 2 * 64 * KIB
        os.close(again)


def test_memory_that_is_not_there_yet(file: int) -> None:
    """Mapping reads nothing, and takes no memory; more than the machine has is refused."""
    place = SavedRegion("ram", 0, GIB, 0, False)
    os.ftruncate(file, GIB)
    before = resident_bytes()
    with map_memory(file, [place]) as memory:
        assert memory.read(GIB - 4096, 4) == bytes(4)
        assert memory.size == GIB
        assert resident_bytes() - before < 4 * MIB
    os.ftruncate(file, 1 << 43)
    with pytest.raises(MemoryTooSmallError, match="do not fit") as caught:
        map_memory(file, [SavedRegion("ram", 0, 1 << 43, 0, False)])
    one_line(caught.value)


def test_no_private_pages_for_others() -> None:
    with MemoryFile("file", 4096) as file, pytest.raises(RegionError, match="be shared") as caught:
        Region(file, 0, private=True, shareable=True)
    one_line(caught.value)


def test_files_and_places_that_do_not_fit(file: int) -> None:
    os.ftruncate(file, MIB)
    inside = SavedRegion("a", 0, MIB, 0, False)
    for places in (
        [SavedRegion("a", 0, 2 * MIB, 0, False)],
        [SavedRegion("a", 0, MIB, 4096, False)],
        [inside, SavedRegion("b", 4096, 4096, 0, False)],
    ):
        with pytest.raises(PykvmError) as caught:
            map_memory(file, places)
        one_line(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"gpa": 1},
        {"gpa": -4096},
        {"gpa": 1 << 60},
        {"size": 0},
        {"size": "4096"},
        {"offset": None},
        {"name": 5},
        {"name": "a\0b"},
        {"read_only": 1},
        {"more": 1},
    ],
)
def test_places_of_no_region(change: dict[str, object]) -> None:
    good = SavedRegion("a", 0, 4096, 0, False).to_values()
    assert SavedRegion.from_values(good).size == 4096
    with pytest.raises(ValueError, match="n"):
        SavedRegion.from_values({**good, **change})
    with pytest.raises(ValueError, match="n"):
        SavedRegion.from_values(None)
