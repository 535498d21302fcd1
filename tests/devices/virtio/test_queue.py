"""pykvm/devices/virtio/queue.c: what an honest driver and a device do with a ring."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pykvm.devices.virtio.device import Feature
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import KIB, MIB
from tests.rigs.virtio_driver import RING_FEATURES, Request, VirtioDriver
from tests.rigs.virtio_queue import Chain, Queue
from tests.rigs.virtio_rings import Buffer

pytestmark = pytest.mark.unit

SIZES = {False: (1, 2, 64), True: (1, 3, 64)}
"""Of split rings, powers of 2; of packed ones, any."""


def _kinds() -> list[tuple[int, int]]:
    return [
        (features, size)
        for features in RING_FEATURES
        for size in SIZES[bool(features & Feature.RING_PACKED)]
    ]


@pytest.fixture(params=_kinds(), ids=lambda kind: f"{kind[0]:#x}-{kind[1]}")
def driver(request: pytest.FixtureRequest) -> Iterator[VirtioDriver]:
    features, size = request.param
    with VirtioDriver([size], features) as made:
        yield made


def _queue(driver: VirtioDriver) -> Queue:
    queue = Queue(driver.memory, driver.queues[0].ring(), driver.features)
    assert queue.fault == 0
    return queue


def _answer(queue: Queue, chain: Chain) -> None:
    """Write what was read, backwards."""
    queue.put(chain, chain.write(chain.read()[::-1]))


def _check(request: Request, sent: bytes) -> None:
    room = sum(buffer.size for buffer in request.buffers if buffer.writable)
    assert request.data == sent[::-1][:room]


def _chain_for(driver: VirtioDriver, pick: random.Random) -> tuple[list[bytes], list[int]]:
    """Return what a chain that the ring may hold reads and writes."""
    most = 6 if driver.features & Feature.INDIRECT_DESC else min(driver.queues[0].size, 6)
    reads = pick.randint(0, most)
    writes = pick.randint(0 if reads else 1, most - reads) if most > reads else 0
    return (
        [pick.randbytes(pick.choice([1, 7, 64, 5000])) for _ in range(reads)],
        [pick.choice([1, 16, 3000]) for _ in range(writes)],
    )


def test_requests_come_and_go(driver: VirtioDriver) -> None:
    """Thousands, in any order, with the device stopped and started again between them."""
    pick = random.Random(driver.features * 100 + driver.queues[0].size)
    queue = _queue(driver)
    sent: dict[int, tuple[Request, bytes]] = {}
    held: list[Chain] = []
    done = 0
    while done < 1500:
        for _ in range(pick.randint(0, 5)):
            readable, writable = _chain_for(driver, pick)
            if request := driver.submit(0, readable, writable):
                sent[id(request)] = request, b"".join(readable)
        driver.kick(0)
        while len(held) < 8 and (chain := queue.take()):
            if pick.random() < 0.1:
                queue.untake(chain)
                break
            held.append(chain)
        pick.shuffle(held)
        for chain in [held.pop() for _ in range(pick.randint(0, len(held)))]:
            _answer(queue, chain)
            if pick.random() < 0.3:
                queue.flush()
        queue.flush()
        for request in driver.completed(0, 0, 0):
            _check(*sent.pop(id(request)))
            done += 1
        if not held and pick.random() < 0.1:
            driver.queues[0].base = queue.base
            queue = _queue(driver)
    assert queue.reason == "nothing"


def test_no_kick_and_no_call_is_lost(driver: VirtioDriver) -> None:
    """Each side sleeps when there is nothing to do, and is woken when there is."""
    pick = random.Random(7)
    queue = _queue(driver)
    awake = True  # the device
    requests = answered = 0
    while answered < 1000:
        for _ in range(pick.randint(1, 3)):
            requests += driver.submit(0, [b"x"]) is not None
        awake = driver.kick(0) or awake
        assert awake
        while awake:
            queue.disable_kicks()
            while chain := queue.take():
                queue.put(chain)
                if pick.random() < 0.2:
                    queue.flush()
            queue.flush()
            awake = queue.enable_kicks()
        answered += len(driver.completed(0, requests - answered, 2.0))
        assert answered == requests, "a call was lost"


@pytest.mark.parametrize("features", RING_FEATURES)
def test_what_is_asleep_is_not_disturbed(features: int) -> None:
    with VirtioDriver([8], features) as driver:
        queue = _queue(driver)
        queue.enable_kicks()
        driver.submit(0, [b"1"])
        assert driver.kick(0)
        queue.disable_kicks()
        driver.submit(0, [b"2"])
        assert not driver.kick(0)
        assert queue.enable_kicks(), "something is there"
        for _ in range(2):
            chain = queue.take()
            assert chain
            queue.put(chain)
        assert queue.flush()
        assert not queue.flush(), "nothing new"
        assert not queue.enable_kicks()
        assert len(driver.completed(0, 2)) == 2
        driver.queues[0].want_calls(False)
        driver.submit(0, [b"3"])
        chain = queue.take()
        assert chain
        queue.put(chain)
        assert not queue.flush()


@pytest.mark.parametrize("features", RING_FEATURES)
def test_a_buffer_in_two_regions(features: int) -> None:
    """It has an iovec for each; beyond the second, memory ends."""
    file = MemoryFile("two", 2 * MIB)
    with file, GuestMemory() as memory:
        memory.add(Region(file, 0, offset=MIB, size=MIB))
        memory.add(Region(file, MIB, size=MIB))
        driver = VirtioDriver([4], features, memory=memory)
        queue = Queue(memory, driver.queues[0].ring(), driver.features)
        memory.write(MIB - 100, bytes(range(200)))
        driver.queues[0].make_available([Buffer(MIB - 100, 200), Buffer(MIB - 8, 16, True)])
        chain = queue.take()
        assert chain
        assert chain.sizes == [100, 100, 8, 8]
        assert chain.read() == bytes(range(200))
        assert chain.read(90, 20) == bytes(range(90, 110))
        assert chain.slice(False, 50, 100) == [50, 50]
        assert chain.slice(False, 100, 100) == [100]
        assert chain.slice(True, 4, 12) == [4, 8]
        assert chain.slice(True, 4, 13) is None
        assert chain.slice(False, 50, 100, room=1) is None
        assert chain.slice(False, 201, 0) is None
        assert chain.write(b"0123456789abcdefg") == 16
        assert memory.read(MIB - 8, 16) == b"0123456789abcdef"
        assert chain.write(b"xyz", 15) == 1
        driver.close()


@pytest.mark.parametrize("packed", [0, int(Feature.RING_PACKED)])
def test_an_index_that_wraps(packed: int) -> None:
    """A ring goes on where another device has stopped, up to the ends of its counters."""
    with VirtioDriver([4], packed | Feature.EVENT_IDX) as driver:
        queue = _queue(driver)
        for n in range(70_000):
            driver.submit(0, [b"x"])
            chain = queue.take()
            assert chain, n
            queue.put(chain)
            assert queue.flush()
            assert len(driver.completed(0)) == 1
            if n % 9000 == 0:
                driver.queues[0].base = queue.base
                queue = _queue(driver)


def test_a_long_chain() -> None:
    """As long as readv() takes; longer ones break the queue."""
    features = int(Feature.INDIRECT_DESC)
    with VirtioDriver([4], features, memory=GuestMemory.create(8 * MIB)) as driver:
        ring = driver.queues[0]
        ring.table = 2048
        queue = _queue(driver)
        at = driver.allocate(4 * KIB)
        ring.tables = 4 * MIB
        ring.make_available([Buffer(at, 1)] * 1024)
        chain = queue.take()
        assert chain
        assert chain.sizes == [1] * 1024
        ring.make_available([Buffer(at, 1)] * 1025)
        assert queue.take() is None
        assert queue.reason == "a descriptor chain that is too long"
        driver.memory.close()
