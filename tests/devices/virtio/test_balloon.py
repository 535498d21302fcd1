"""pykvm.devices.virtio.balloon: memory goes back to the host, and no other memory does."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from pykvm.devices.virtio.balloon import (
    Balloon,
    BalloonCounters,
    BalloonFeature,
    BalloonTargetError,
    Statistic,
)
from pykvm.devices.virtio.device import DeviceStateError, Feature
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import MIB, PAGE_SIZE
from tests.rigs.virtio_driver import RING_FEATURES, VirtioDriver
from tests.rigs.virtio_rings import Buffer
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

INFLATE, DEFLATE, STATISTICS, REPORTING = range(4)
ALL = int(BalloonFeature.STATS_VQ | BalloonFeature.REPORTING)
RAM, WINDOW, ROM = 16 * MIB, 32 * MIB, 48 * MIB
"""Sizes of RAM, and where a window that is shared with others and a read-only region are."""

FIRST = 8 * MIB
"""Where the pages of the tests begin, behind the rings."""


class Guest:
    """A guest's memory, full of patterns, with the files that it is in."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.files = {}
        for gpa, size in ((0, RAM), (WINDOW, MIB), (ROM, MIB)):
            file = MemoryFile(f"balloon-{gpa:x}", size)
            self.files[gpa] = file
            self.memory.add(Region(file, gpa, read_only=gpa == ROM))
        self.ram = self.memory.region_at(0)
        for gpa in (FIRST, WINDOW, ROM):
            region = self.memory.region_at(gpa)
            self.memory.write(gpa, b"\xa5" * (region.end - gpa))

    def used(self, gpa: int = 0) -> int:
        """Bytes that the host has spent on a region."""
        return os.fstat(self.files[gpa].fd).st_blocks * 512

    def pages(self, gpa: int, size: int) -> set[int]:
        """Return the pages that are empty."""
        empty = bytes(PAGE_SIZE)
        return {
            at for at in range(gpa, gpa + size, PAGE_SIZE) if self.memory.read(at, 4096) == empty
        }

    def close(self) -> None:
        self.memory.close()
        for file in self.files.values():
            file.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


@pytest.fixture
def device(guest: Guest) -> Iterator[Balloon]:
    made = Balloon(guest.memory, [guest.ram])
    yield made
    made.close()


def _numbers(*gpas: int) -> bytes:
    return b"".join(struct.pack("<I", gpa >> 12) for gpa in gpas)


def _driver(guest: Guest, features: int = ALL) -> VirtioDriver:
    return VirtioDriver([128] * 4, features, memory=guest.memory)


@pytest.mark.parametrize("ring", RING_FEATURES, ids=hex)
def test_inflated_pages_go_back(guest: Guest, device: Balloon, ring: int) -> None:
    up = range(FIRST, FIRST + 64 * PAGE_SIZE, PAGE_SIZE)
    down = range(FIRST + 200 * PAGE_SIZE, FIRST + 100 * PAGE_SIZE, -PAGE_SIZE)
    scattered = range(FIRST + 300 * PAGE_SIZE, FIRST + 400 * PAGE_SIZE, 3 * PAGE_SIZE)
    with _driver(guest, ALL | ring) as driver:
        driver.start(device)
        before = guest.used()
        for pages in (up, down, scattered):
            assert driver.request(INFLATE, [_numbers(*pages)]).written == 0
        given = {*up, *down, *scattered}
        assert guest.used() <= before - (len(given) - 8) * PAGE_SIZE  # rings take some
        assert guest.pages(FIRST, RAM - FIRST) == given
        assert device.counters() == BalloonCounters(len(given), 0, 0, 0)
        assert driver.request(DEFLATE, [_numbers(*up)]).written == 0
        guest.memory.write(FIRST, b"used again")
        assert guest.memory.read(FIRST, 11) == b"used again\0"
        assert device.counters().deflated == 64
        driver.stop(device)


def test_nothing_else_is_given_back(guest: Guest, device: Balloon) -> None:
    """A hostile driver names what is not RAM: shared, read-only, not there."""
    lists = [
        _numbers(WINDOW, WINDOW + PAGE_SIZE, ROM, RAM, 24 * MIB),
        b"\xff" * 400,
        _numbers(*range(RAM, RAM + 400 * PAGE_SIZE, PAGE_SIZE)),
        b"",
        b"\0\0\0",
        _numbers(FIRST)[:3],
    ]
    with _driver(guest) as driver:
        driver.start(device)
        for numbers in lists:
            driver.request(INFLATE, [numbers] if numbers else [], [] if numbers else [8])
        assert guest.pages(FIRST, RAM - FIRST) == set()
        for gpa in (WINDOW, ROM):
            assert guest.used(gpa) == MIB
            assert guest.pages(gpa, MIB) == set()
        assert device.counters() == BalloonCounters(0, 0, 0, 5 + 100 + 400)
        driver.request(INFLATE, [_numbers(RAM, FIRST, WINDOW), _numbers(FIRST + PAGE_SIZE) + b"x"])
        assert guest.pages(FIRST, RAM - FIRST) == {FIRST, FIRST + PAGE_SIZE}
        driver.stop(device)


def test_a_list_that_is_too_long(guest: Guest, device: Balloon) -> None:
    with _driver(guest) as driver:
        driver.start(device)
        driver.request(INFLATE, [_numbers(FIRST) * 1024 + _numbers(FIRST + PAGE_SIZE) * 9])
        assert guest.pages(FIRST, RAM - FIRST) == {FIRST}
        assert device.counters() == BalloonCounters(1024, 0, 0, 9)
        driver.stop(device)


def _report(driver: VirtioDriver, queue: int, *buffers: tuple[int, int]) -> None:
    chain = [Buffer(gpa, size, True) for gpa, size in buffers]
    assert driver.queues[queue].make_available(chain) is not None
    driver.kick(queue)
    assert driver.queues[queue].wait_used(1)


@pytest.mark.parametrize("ring", RING_FEATURES, ids=hex)
def test_reported_pages_go_back(guest: Guest, device: Balloon, ring: int) -> None:
    with _driver(guest, ALL | ring) as driver:
        driver.start(device)
        _report(driver, REPORTING, (FIRST, 2 * MIB), (FIRST + 4 * MIB, MIB))
        assert device.counters() == BalloonCounters(0, 0, 3 * MIB, 0)
        given = {
            *range(FIRST, FIRST + 2 * MIB, PAGE_SIZE),
            *range(FIRST + 4 * MIB, FIRST + 5 * MIB, PAGE_SIZE),
        }
        assert guest.pages(FIRST, RAM - FIRST) == given
        driver.stop(device)


def test_reports_of_parts_of_pages_and_of_what_is_no_ram(guest: Guest, device: Balloon) -> None:
    with _driver(guest) as driver:
        driver.start(device)
        _report(driver, REPORTING, (FIRST + 1, PAGE_SIZE), (FIRST + 100, 50), (FIRST + 4095, 1))
        assert guest.pages(FIRST, RAM - FIRST) == set()
        _report(driver, REPORTING, (FIRST + 1, 3 * PAGE_SIZE))
        assert guest.pages(FIRST, RAM - FIRST) == {FIRST + PAGE_SIZE, FIRST + 2 * PAGE_SIZE}
        _report(driver, REPORTING, (WINDOW, MIB), (RAM - PAGE_SIZE, PAGE_SIZE))
        assert guest.pages(WINDOW, MIB) == set()
        assert device.counters() == BalloonCounters(0, 0, 3 * PAGE_SIZE, 1)
        # A report of readable buffers says nothing.
        driver.request(REPORTING, [b"x" * 8192])
        reasons: list[str] = []
        device.on_failure = reasons.append
        chain = [Buffer(ROM, PAGE_SIZE, True)]
        driver.queues[REPORTING].make_available(chain)
        driver.kick(REPORTING)
        wait_for(lambda: reasons, 10)
        assert reasons == ["a buffer outside of guest memory"]
        assert guest.pages(ROM, MIB) == set()
        driver.stop(device)


@pytest.mark.parametrize(
    ("features", "queues", "reporting"),
    [
        (BalloonFeature.REPORTING, [0, 1, 2], 2),  # Linux, which leaves out what is not there
        (ALL, [0, 1, 2, 3], 3),
        (ALL, [0, 1, 2, 4], 4),  # the specification
        (BalloonFeature.REPORTING, [0, 1, 4], 4),
        (0, [0, 1], None),
        (BalloonFeature.STATS_VQ, [0, 1, 2], None),
        (ALL, [0, 1, 2], None),  # a driver that has forgotten one
    ],
)
def test_numbers_of_queues(
    guest: Guest, device: Balloon, features: int, queues: list[int], reporting: int | None
) -> None:
    with VirtioDriver([64] * 5, int(features), memory=guest.memory) as driver:
        driver.start(device, queues)
        driver.request(INFLATE, [_numbers(FIRST)])
        if reporting is not None:
            _report(driver, reporting, (FIRST, MIB))
            assert device.counters().reported == MIB
        driver.stop(device)


def _told(**values: int) -> bytes:
    return b"".join(struct.pack("<HQ", Statistic[tag], value) for tag, value in values.items())


@pytest.mark.parametrize("ring", RING_FEATURES, ids=hex)
def test_statistics(guest: Guest, device: Balloon, ring: int) -> None:
    with _driver(guest, ALL | ring) as driver:
        assert device.statistics() == {}
        device.ask()
        driver.start(device)
        driver.submit(STATISTICS, [_told(FREE=5 * MIB, TOTAL=16 * MIB)])
        driver.kick(STATISTICS)
        expected = {Statistic.FREE: 5 * MIB, Statistic.TOTAL: 16 * MIB}
        wait_for(lambda: device.statistics() == expected, 10)
        for n in range(20):
            device.ask()
            assert len(driver.completed(STATISTICS, 1)) == 1
            driver.submit(STATISTICS, [_told(FREE=n, SWAP_IN=1 << 63)])
            driver.kick(STATISTICS)
            wait_for(lambda: device.statistics()[Statistic.FREE] == n, 10)  # noqa: B023
            if n % 3 == 0:  # the buffer that is held is taken again
                driver.stop(device)
                driver.start(device)
        assert device.statistics()[Statistic.SWAP_IN] == 1 << 63
        driver.stop(device)
    assert device.statistics()[Statistic.TOTAL] == 16 * MIB


def test_statistics_that_are_none(guest: Guest, device: Balloon) -> None:
    with _driver(guest) as driver:
        driver.start(device)
        rubbish = [
            b"",
            b"\4\0",
            b"\xff" * 5000,
            struct.pack("<HQ", 16, 1),
            _told(FREE=1) + b"\5\0\1\2",
        ]
        for data in rubbish:
            driver.submit(STATISTICS, [data] if data else [], [] if data else [10])
        driver.kick(STATISTICS)  # all at once, though one is due at a time
        for n in range(len(rubbish)):
            assert len(driver.completed(STATISTICS, 1, 0.05)) == 0
            device.ask()
            assert len(driver.completed(STATISTICS, 1)) == 1, n
        assert device.statistics() == {Statistic.FREE: 1}
        driver.request(INFLATE, [_numbers(FIRST)])
        driver.stop(device)


def test_the_configuration(guest: Guest, device: Balloon) -> None:
    changes: list[bytes] = []
    device.on_config = lambda: changes.append(device.config())
    device.target = 4 * MIB
    assert changes == [struct.pack("<IIII", 1024, 0, 0, 0)]
    device.write_config(4, struct.pack("<I", 1000))
    assert device.actual == 1000 * PAGE_SIZE
    for offset, data in (
        (0, b"\xff" * 4),
        (16, b"\xff" * 8),
        (1 << 20, b"\xff"),
        (14, b"\xff" * 9),
    ):
        device.write_config(offset, data)
    assert device.config() == struct.pack("<IIII", 1024, 1000, 0, 0)
    device.write_config(5, b"\1")
    assert device.actual == (1000 & 0xFF | 0x100) * PAGE_SIZE
    for size in (-PAGE_SIZE, 1, RAM + PAGE_SIZE):
        with pytest.raises(BalloonTargetError, match="use a multiple of 4096 that is smaller"):
            device.target = size
    assert device.target == 4 * MIB


def test_another_balloon_goes_on(guest: Guest, device: Balloon) -> None:
    """As after a snapshot: it has the size that the guest believes, and serves what comes."""
    with VirtioDriver([16] * 5, ALL, memory=guest.memory) as driver:
        driver.start(device)
        device.target = 2 * MIB
        device.write_config(4, (77).to_bytes(4, "little"))
        # The driver's buffer for statistics is with the device, which gives it back.
        assert driver.submit(STATISTICS, readable=[struct.pack("<HQ", Statistic.FREE, 5)])
        driver.kick(STATISTICS)
        wait_for(lambda: device.statistics().get(Statistic.FREE) == 5)
        driver.stop(device)
        state = device.save()
        config = device.config()
        device.close()
        other = Balloon(guest.memory, [guest.ram])
        changes: list[object] = [None, [], {}, {**state, "more": 1}]
        changes += [{**state, "target": wrong} for wrong in (-1, 1 << 20, "0", None, True)]
        changes += [{**state, "actual": wrong} for wrong in (-1, 1 << 32, 0.5)]
        for wrong in changes:
            with pytest.raises(DeviceStateError):
                other.restore(wrong)
        other.restore(state)
        assert other.config() == config
        assert (other.target, other.actual) == (2 * MIB, 77 * PAGE_SIZE)
        driver.start(other)
        wait_for(lambda: other.statistics().get(Statistic.FREE) == 5)
        other.ask()
        assert driver.completed(STATISTICS)
        other.close()


def test_a_closed_device(guest: Guest, device: Balloon) -> None:
    with _driver(guest, ALL | Feature.INDIRECT_DESC) as driver:
        driver.start(device)
        driver.request(INFLATE, [_numbers(FIRST)])
        device.close()
        assert device.counters().inflated == 1
        assert device.statistics() == {}
        device.ask()
