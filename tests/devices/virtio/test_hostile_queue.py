"""pykvm/devices/virtio/queue.c: whatever a driver writes, the queue is used or broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pykvm.devices.virtio.device import Feature
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import MIB
from tests.rigs.virtio_driver import VirtioDriver
from tests.rigs.virtio_queue import Queue
from tests.rigs.virtio_rings import INDIRECT, NEXT, WRITE, PackedQueue, SplitQueue

pytestmark = pytest.mark.unit

END = 16 * MIB
"""Where guest memory ends."""

AT = 8 * MIB
"""A buffer."""

LOOP = "a descriptor chain that does not end"
OUTSIDE = "a buffer outside of guest memory"
NESTED = "an indirect descriptor where none may be"
TABLE = "an indirect table that is not valid"
LONG = "a descriptor chain that is too long"
INDEX = "a descriptor index outside of its table"
ORDER = "a readable descriptor after a writable one"
AHEAD = "more available buffers than the ring has entries"


@dataclass
class Entry:
    """A descriptor: of the ring, or of an indirect table."""

    address: int = AT
    length: int = 16
    flags: int = 0
    next: int = 0


@pytest.fixture(params=[0, int(Feature.RING_PACKED)], ids=["split", "packed"])
def driver(request: pytest.FixtureRequest) -> Iterator[VirtioDriver]:
    with VirtioDriver([8], request.param | Feature.INDIRECT_DESC) as made:
        yield made


def _queue(driver: VirtioDriver, **more: int) -> Queue:
    queue = Queue(driver.memory, driver.queues[0].ring(), driver.features, **more)
    assert queue.fault == 0
    return queue


def _offer(driver: VirtioDriver, entries: list[Entry]) -> None:
    """Write a chain into the ring's first descriptors and make it available."""
    ring = driver.queues[0]
    for n, entry in reversed(list(enumerate(entries))):
        flags = entry.flags
        if isinstance(ring, PackedQueue):
            flags |= ring.available_flags(True)
        ring.write_descriptor(n, entry.address, entry.length, flags, entry.next)
    if isinstance(ring, SplitQueue):
        ring.publish(0)


def _table(driver: VirtioDriver, entries: list[Entry], at: int = AT) -> None:
    packed = isinstance(driver.queues[0], PackedQueue)
    for n, entry in enumerate(entries):
        words = (0, entry.flags) if packed else (entry.flags, entry.next)
        driver.memory.write(
            at + 16 * n,
            entry.address.to_bytes(8, "little")
            + entry.length.to_bytes(4, "little")
            + b"".join(word.to_bytes(2, "little") for word in words),
        )


def _reason(driver: VirtioDriver, **more: int) -> str:
    """Take once; return why the queue is broken, or "nothing"."""
    queue = _queue(driver, **more)
    chain = queue.take()
    assert (chain is None) == bool(queue.raw.broken)
    if queue.raw.broken:
        assert queue.take() is None, "a broken queue stays broken"
        assert not queue.enable_kicks()
    return queue.reason


RING = {
    "a buffer behind the end": ([Entry(END)], OUTSIDE),
    "a buffer over the end": ([Entry(END - 8)], OUTSIDE),
    "a buffer over the end of addresses": ([Entry(2**64 - 8)], OUTSIDE),
    "the last address": ([Entry(2**64 - 1, 1)], OUTSIDE),
    "the longest buffer": ([Entry(AT, 2**32 - 1)], LONG),
    "a buffer of nothing": ([Entry(2**63, 0)], "nothing"),
    "wrong order": ([Entry(flags=WRITE | NEXT, next=1), Entry()], ORDER),
    "an indirect table of nothing": ([Entry(AT, 0, INDIRECT)], TABLE),
    "half an entry": ([Entry(AT, 24, INDIRECT)], TABLE),
    "a table that is too long": ([Entry(AT, 1025 * 16, INDIRECT)], LONG),
    "a table outside": ([Entry(END, 16, INDIRECT)], OUTSIDE),
    "a table over the end of addresses": ([Entry(2**64 - 16, 32, INDIRECT)], OUTSIDE),
    "a table that is not the last": ([Entry(AT, 16, INDIRECT | NEXT, 1), Entry()], NESTED),
}


@pytest.mark.parametrize("name", RING)
def test_a_bad_chain(driver: VirtioDriver, name: str) -> None:
    entries, reason = RING[name]
    _offer(driver, entries)
    assert _reason(driver) == reason


TABLES = {
    "indirect in indirect": ([Entry(AT, 16, INDIRECT)], NESTED),
    "a buffer outside": ([Entry(END)], OUTSIDE),
    "wrong order": ([Entry(flags=WRITE | NEXT, next=1), Entry()], ORDER),
    "two buffers": ([Entry(flags=NEXT, next=1), Entry(flags=WRITE)], "nothing"),
}


@pytest.mark.parametrize("write", [0, WRITE])
@pytest.mark.parametrize("name", TABLES)
def test_a_bad_table(driver: VirtioDriver, name: str, write: int) -> None:
    """The WRITE flag of what points to it means nothing."""
    entries, reason = TABLES[name]
    _table(driver, entries)
    _offer(driver, [Entry(AT, 16 * len(entries), INDIRECT | write)])
    assert _reason(driver) == reason


def test_a_table_without_the_feature(driver: VirtioDriver) -> None:
    _table(driver, [Entry()])
    _offer(driver, [Entry(AT, 16, INDIRECT)])
    driver.features &= ~Feature.INDIRECT_DESC
    assert _reason(driver) == TABLE


def test_bounds_of_the_device(driver: VirtioDriver) -> None:
    _offer(driver, [Entry(flags=NEXT, next=1), Entry(flags=WRITE)])
    assert _reason(driver, most_bytes=31) == LONG
    assert _reason(driver, most_bytes=32) == "nothing"
    assert _reason(driver, room=1) == LONG
    assert _reason(driver, room=2) == "nothing"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([Entry(flags=NEXT, next=0)], LOOP),
        ([Entry(flags=NEXT, next=1), Entry(flags=NEXT, next=0)], LOOP),
        ([Entry(flags=NEXT, next=8)], INDEX),
        ([Entry(flags=NEXT, next=0xFFFF)], INDEX),
    ],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_a_bad_link(entries: list[Entry], reason: str, indirect: bool) -> None:
    with VirtioDriver([8], Feature.INDIRECT_DESC) as driver:
        if indirect:
            _table(driver, entries)
            entries = [Entry(AT, 16 * len(entries), INDIRECT)]
        _offer(driver, entries)
        assert _reason(driver) == reason


def test_a_bad_head() -> None:
    with VirtioDriver([8]) as driver:
        ring = driver.queues[0]
        assert isinstance(ring, SplitQueue)
        ring.publish(8)
        assert _reason(driver) == INDEX


def test_a_packed_chain_without_end() -> None:
    with VirtioDriver([8], Feature.RING_PACKED) as driver:
        _offer(driver, [Entry(flags=NEXT)] * 8)
        assert _reason(driver) == LOOP


@pytest.mark.parametrize("ahead", [9, 0x8000, 0xFFFF])
def test_an_index_that_runs_ahead(ahead: int) -> None:
    with VirtioDriver([8]) as driver:
        ring = driver.queues[0]
        assert isinstance(ring, SplitQueue)
        ring.words[ring.avail + 1] = ahead
        assert _reason(driver) == AHEAD


def test_a_ring_that_is_filled_twice(driver: VirtioDriver) -> None:
    """What the device has not given back yet cannot be available again."""
    queue = _queue(driver)
    ring = driver.queues[0]
    for n in range(9):
        if isinstance(ring, PackedQueue):
            ring.write_descriptor(n % 8, AT, 16, ring.available_flags(n < 8), 0)
        elif isinstance(ring, SplitQueue):
            ring.write_descriptor(0, AT, 16, 0, 0)
            ring.publish(0)
        chain = queue.take()
        assert (chain is None) == (n == 8)
        if chain and n < 4:
            queue.put(chain)  # without a flush the driver cannot know it
    assert queue.reason == AHEAD


def _fault(driver: VirtioDriver, /, **changes: int) -> str:
    ring = dataclasses.replace(driver.queues[0].ring(), **changes)
    queue = Queue(driver.memory, ring, driver.features)
    assert queue.fault == queue.raw.broken
    assert not queue.fault or queue.take() is None
    return queue.reason


def test_a_bad_ring(driver: VirtioDriver) -> None:
    packed = isinstance(driver.queues[0], PackedQueue)
    size = "a queue size that the ring cannot have"
    for bad in (0, 32769, 65535, 2**32 - 1):
        assert _fault(driver, size=bad) == size
    assert _fault(driver, size=6) == ("nothing" if packed else size)
    place = "a ring outside of guest memory, or not aligned"
    for part, unaligned in (
        ("descriptors", 8),
        ("driver", 2 if packed else 1),
        ("device", 2),
    ):
        assert _fault(driver, **{part: END}) == place
        assert _fault(driver, **{part: END - 2}) == place
        assert _fault(driver, **{part: 2**64 - 16}) == place
        assert _fault(driver, **{part: AT + unaligned}) == place
        assert _fault(driver, **{part: AT}) == "nothing"


def test_a_bad_base(driver: VirtioDriver) -> None:
    base = "a starting position outside of the ring"
    if isinstance(driver.queues[0], PackedQueue):
        assert _fault(driver, base=8) == base
        assert _fault(driver, base=8 << 16) == base
        assert _fault(driver, base=0x8007_8007) == "nothing"
    else:
        assert _fault(driver, base=0x1_0000) == base
        assert _fault(driver, base=0xFFFF) == "nothing"


def test_memory_that_is_read_only() -> None:
    """A device reads it for the guest, and does not write it for the guest."""
    with MemoryFile("rom", 2 * MIB) as file, GuestMemory() as memory:
        memory.add(Region(file, 0, size=MIB))
        memory.add(Region(file, MIB, offset=MIB, size=MIB, read_only=True))
        driver = VirtioDriver([8], memory=memory)
        _offer(driver, [Entry(MIB)])
        assert _reason(driver) == "nothing"
        _offer(driver, [Entry(MIB, flags=WRITE)])
        assert _reason(driver) == OUTSIDE
        _offer(driver, [Entry(MIB - 8, flags=WRITE)])
        assert _reason(driver) == OUTSIDE
        ring = "a ring outside of guest memory, or not aligned"
        assert _fault(driver, device=MIB) == ring
        assert _fault(driver, driver=MIB) == "nothing"
        driver.close()
