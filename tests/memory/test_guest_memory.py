"""Guest memory, with real memfds and mappings."""

import ctypes
import fcntl
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.memory import guest_memory
from pykvm.memory.guest_memory import GuestMemory, MemorySlot, RegionOverlapError
from pykvm.memory.limits import (
    HugePagesError,
    LockLimitError,
    MemoryTooSmallError,
    lockable_bytes,
    require_lockable,
)
from pykvm.memory.regions import (
    HUGE_1G,
    HUGE_2M,
    AddressError,
    ClosedMemoryError,
    MemoryFile,
    Region,
    RegionError,
)

pytestmark = pytest.mark.unit

PAGE = 4096


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"/memfd:{name} ")


def _resident(name: str) -> int:
    """Return the KiB of the mapping that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if f"/memfd:{name} " in line:
            return next(int(low.split()[1]) for low in lines if low.startswith("Rss:"))
    raise AssertionError(f"{name} is not mapped")


def test_memory_is_zero_and_keeps_what_is_written() -> None:
    with GuestMemory.create(4 * PAGE, gpa=0x10000) as memory:
        assert memory.size == 4 * PAGE
        assert memory.read(0x10000, 4 * PAGE) == bytes(4 * PAGE)
        memory.write(0x10FFE, b"abcd")  # across a page boundary
        assert memory.read(0x10FFD, 6) == b"\0abcd\0"
        assert memory.read(0x14000, 0) == b""
        assert bytes(memory.view(0x10FFE, 4)) == b"abcd"
        memory.view(0x13FFF, 1)[0] = 7
        assert memory.read(0x13FFF, 1) == b"\x07"


def test_write_takes_buffers_of_wider_items() -> None:
    with GuestMemory.create(PAGE) as memory:
        words = memory.view(0, 16).cast("Q")
        words[1] = 0x1122334455667788
        assert memory.read(8, 8) == bytes.fromhex("8877665544332211")
        memory.write(16, words)
        assert memory.read(24, 8) == bytes.fromhex("8877665544332211")


def test_host_address_is_that_of_the_byte() -> None:
    with GuestMemory.create(2 * PAGE, gpa=0x5000) as memory:
        memory.write(0x5123, b"host")
        assert ctypes.string_at(memory.host_address(0x5123), 4) == b"host"
        ctypes.memmove(memory.host_address(0x6FFC, 4), b"back", 4)
        assert memory.read(0x6FFC, 4) == b"back"
        assert memory.host_address(0x5000) % PAGE == 0
        with pytest.raises(AddressError, match="stay below 0x7000, where region guest ends"):
            memory.host_address(0x6FFC, 5)


@pytest.mark.parametrize(("gpa", "size"), [(0x4FFF, 1), (0x7000, 1), (0x6FFF, 2), (0x5000, 0x2001)])
def test_out_of_bounds(gpa: int, size: int) -> None:
    with GuestMemory.create(2 * PAGE, gpa=0x5000) as memory:
        before = memory.read(0x5000, 2 * PAGE)
        calls: list[Callable[[], object]] = [
            lambda: memory.read(gpa, size),
            lambda: memory.view(gpa, size),
            lambda: memory.write(gpa, b"\xff" * size),
            lambda: memory.host_address(gpa, size),
        ]
        for call in calls:
            with pytest.raises(AddressError) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert memory.read(0x5000, 2 * PAGE) == before
        with pytest.raises(AddressError):
            memory.read(0x5000, -1)
        with pytest.raises(AddressError):
            memory.view(0x5001, -1)


def test_no_memory_names_what_there_is() -> None:
    with (
        GuestMemory.create(PAGE, gpa=0x5000) as memory,
        pytest.raises(AddressError, match=r"at 0x0: use what the guest has: 0x5000-0x6000"),
    ):
        memory.read(0, 1)


def test_regions_side_by_side_read_as_one() -> None:
    with MemoryFile("a", 2 * PAGE) as file, GuestMemory() as memory:
        # In the opposite order of their GPAs.
        second = memory.add(Region(file, 0x2000, offset=0, size=PAGE))
        first = memory.add(Region(file, 0x1000, offset=PAGE, size=PAGE, read_only=True))
        assert memory.regions == (first, second)
        memory.write(0x1FFE, b"abcd")
        assert memory.read(0x1FFE, 4) == b"abcd"
        assert bytes(second.view(0, 2)) == b"cd"
        with pytest.raises(AddressError, match="stay below 0x2000, where region a ends"):
            memory.view(0x1FFE, 4)
        assert list(memory.slots(5)) == [
            MemorySlot(5, 0x1000, PAGE, first.host_address, True),
            MemorySlot(6, 0x2000, PAGE, second.host_address, False),
        ]


@pytest.mark.parametrize(
    ("gpa", "pages"), [(0x1000, 2), (0x2000, 1), (0x2000, 2), (0x3000, 1), (0x3000, 2), (0x4000, 2)]
)
def test_regions_do_not_overlap(gpa: int, pages: int) -> None:
    with MemoryFile("a", 2 * PAGE) as file, GuestMemory() as memory:
        memory.add(Region(file, 0x2000))
        memory.add(Region(file, 0x4000, size=PAGE))
        other = Region(file, gpa, size=pages * PAGE)
        with pytest.raises(RegionOverlapError, match="choose another gpa"):
            memory.add(other)
        assert not other.closed
        other.close()
        assert len(memory.regions) == 2


def test_one_file_in_two_guests() -> None:
    with (
        MemoryFile("windows", 4 * PAGE) as file,
        GuestMemory.create(PAGE) as one,
        GuestMemory.create(PAGE) as two,
    ):
        one.add(Region(file, 1 << 32, offset=2 * PAGE, size=PAGE))
        two.add(Region(file, 0x8000))
        file.close()  # regions keep the memory
        one.write(1 << 32, b"shared")
        assert two.read(0x8000 + 2 * PAGE, 6) == b"shared"


def test_remove_closes_the_region() -> None:
    with MemoryFile("a", PAGE) as file, GuestMemory.create(PAGE) as memory:
        region = memory.add(Region(file, 0x8000))
        memory.remove(region)
        assert region.closed
        with pytest.raises(AddressError):
            memory.read(0x8000, 1)


def test_close_leaves_nothing_and_may_be_repeated() -> None:
    fds = _open_fds()
    memory = GuestMemory.create(PAGE, name="closing")
    region = memory.regions[0]
    assert _mappings("closing") == 1
    memory.close()
    memory.close()
    region.close()
    assert _mappings("closing") == 0
    assert _open_fds() == fds
    calls: list[Callable[[], object]] = [
        lambda: memory.read(0, 1),
        lambda: memory.host_address(0),
        region.view,
        lambda: region.host_address,
    ]
    for call in calls:
        with pytest.raises(ClosedMemoryError):
            call()
    with MemoryFile("a", PAGE) as file, Region(file, 0) as other:
        with pytest.raises(ClosedMemoryError):
            memory.add(other)
        file.close()
        file.close()
        with pytest.raises(ClosedMemoryError):
            _ = file.fd


def test_a_view_outlives_close() -> None:
    memory = GuestMemory.create(PAGE, name="viewed")
    view = memory.view(0, 4)
    memory.close()
    view[:] = b"kept"
    assert bytes(view) == b"kept"
    assert _mappings("viewed") == 1
    del view
    gc.collect()
    assert _mappings("viewed") == 0


def test_failed_construction_leaves_nothing() -> None:
    fds = _open_fds()
    with MemoryFile("a", 2 * PAGE) as file:
        for offset in (1, 2 * PAGE, -PAGE):
            with pytest.raises(RegionError):
                Region(file, 0, offset=offset)
        for size in (3 * PAGE, 0, PAGE + 1):
            with pytest.raises(RegionError):
                Region(file, 0, size=size)
        with pytest.raises(RegionError):
            Region(file, 0x800)
    for size in (0, -PAGE, 100):
        with pytest.raises(RegionError, match="use a positive multiple of 0x1000"):
            MemoryFile("a", size)
    with pytest.raises(RegionError, match="use HUGE_2M or HUGE_1G"):
        MemoryFile("a", PAGE, huge_page=PAGE)
    assert _open_fds() == fds


def test_size_is_sealed() -> None:
    with MemoryFile("sealed", 2 * PAGE) as file:
        for size in (PAGE, 3 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(file.fd, size)
        assert os.fstat(file.fd).st_size == 2 * PAGE
        with pytest.raises(PermissionError):
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with MemoryFile("open", 2 * PAGE, sealed=False) as file:
        os.ftruncate(file.fd, 3 * PAGE)


def test_descriptor_is_not_inherited() -> None:
    with MemoryFile("a", PAGE) as file:
        assert not os.get_inheritable(file.fd)


def test_prefault_allocates_at_once() -> None:
    size = 2 << 20
    with (
        GuestMemory.create(size, name="lazy"),
        GuestMemory.create(size, name="eager", prefault=True),
    ):
        assert _resident("lazy") == 0
        assert _resident("eager") == size >> 10


def test_more_than_the_machine_has() -> None:
    fds = _open_fds()
    with pytest.raises(MemoryTooSmallError, match=r"do not fit into \d+ MiB \(MemTotal\)"):
        GuestMemory.create(1 << 46)
    assert _open_fds() == fds


def test_more_than_is_free_is_refused_before_it_is_touched() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    fds = _open_fds()
    with pytest.raises(MemoryTooSmallError, match="MemAvailable"):
        GuestMemory.create(total - (total % PAGE), prefault=True)
    assert _open_fds() == fds


@pytest.mark.parametrize("huge_page", [HUGE_2M, HUGE_1G])
def test_huge_pages_come_or_say_what_to_type(huge_page: int) -> None:
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{huge_page >> 10}kB")
    fds = _open_fds()
    if not pool.exists():
        with pytest.raises(HugePagesError, match="leave out huge_page"):
            GuestMemory.create(huge_page, huge_page=huge_page)
    elif int((pool / "free_hugepages").read_text()) == 0:
        with pytest.raises(HugePagesError, match=r"type `echo \d+ > /.*nr_hugepages` as root"):
            GuestMemory.create(huge_page, huge_page=huge_page)
    else:
        with GuestMemory.create(huge_page, name="huge", huge_page=huge_page) as memory:
            memory.write(huge_page - 4, b"huge")
            assert memory.read(huge_page - 4, 4) == b"huge"
            assert memory.host_address(0) % huge_page == 0
            assert memory.regions[0].page_size == huge_page
    assert _open_fds() == fds


def test_huge_page_sizes_are_multiples() -> None:
    with pytest.raises(RegionError, match="use a positive multiple of 0x200000"):
        MemoryFile("a", PAGE, huge_page=HUGE_2M)


_LIMITED = """
import os, resource, sys
from pykvm.memory.limits import *
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.getuid() == 0:
    os.setuid(65534)  # without this change of user CAP_IPC_LOCK lifts the limit
assert lockable_bytes() == 65536, lockable_bytes()
require_lockable(65536)
try:
    require_lockable(65537)
except LockLimitError as error:
    print(error)
"""


def test_lock_limit_says_what_to_type() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(guest_memory.__file__).parents[2],
    )
    assert done.stdout == (
        "65 KiB have to be pinned and only 64 KiB may be: "
        "type `ulimit -l 65` in a root shell, or run as root\n"
    )


def test_lock_limit_of_this_process() -> None:
    limit = lockable_bytes()
    if limit is None:
        require_lockable(1 << 60)
        assert os.getuid() == 0 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 0
    else:
        require_lockable(limit)
        with pytest.raises(LockLimitError):
            require_lockable(limit + 1)


def test_a_region_for_other_processes() -> None:
    with MemoryFile("ram", 8192) as file:
        region = Region(file, 0, offset=4096, shareable=True)
        alone = Region(file, 0)
    region.view()[:5] = b"hello"
    assert region.shareable
    assert os.pread(region.fd, 5, region.offset) == b"hello"
    fd = region.fd
    region.close()
    assert not region.shareable
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ClosedMemoryError):
        _ = region.fd
    with alone, pytest.raises(RegionError, match="make it with shareable=True"):
        _ = alone.fd
