"""pykvm.devices.virtio.entropy, and with it the loop that all devices in C have."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.closeable import ForkedProcessError
from pykvm.devices.virtio.device import NO_CALL, Feature
from pykvm.devices.virtio.entropy import Entropy
from pykvm.devices.virtio.loop import RingError
from pykvm.sizes import KIB, MIB
from tests.rigs.forks import in_fork
from tests.rigs.virtio_driver import RING_FEATURES, VirtioDriver
from tests.rigs.virtio_rings import Buffer, SplitQueue
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit


@pytest.fixture(params=RING_FEATURES, ids=hex)
def driver(request: pytest.FixtureRequest) -> Iterator[VirtioDriver]:
    with VirtioDriver([8], request.param) as made:
        yield made


@pytest.fixture
def device(driver: VirtioDriver) -> Iterator[Entropy]:
    made = Entropy(driver.memory)
    yield made
    made.close()


def test_random_numbers(driver: VirtioDriver, device: Entropy) -> None:
    driver.start(device)
    seen = set()
    for size in (1, 16, 4096, 65536):
        answer = driver.request(0, writable=[size])
        assert answer.written == size
        seen.add(answer.data)
        assert size < 100 or len(set(answer.data)) > 200
    assert len(seen) == 4
    answer = driver.request(0, writable=[100, 200, 60 * KIB, 60 * KIB][:8])
    assert answer.written == 64 * KIB, "no more for one request"
    assert driver.request(0, readable=[b"what is this"]).written == 0
    assert driver.request(0, [b"and"], [3]).written == 3
    driver.stop(device)


def test_stopped_and_started_again(driver: VirtioDriver, device: Entropy) -> None:
    """Nothing is lost or answered twice, whenever it happens."""
    done = requests = 0
    assert device.stop() == {}
    for n in range(60):
        driver.start(device)
        assert device.running
        for _ in range(n % 9):
            requests += driver.submit(0, writable=[64]) is not None
        driver.kick(0)
        if n % 3 == 0:
            done += len(driver.completed(0, requests - done))
            assert done == requests
        driver.stop(device)
        assert not device.running
        assert device.stop() == {}
        done += len(driver.completed(0, 0, 0))
    driver.start(device)  # what was made available meanwhile needs no further kick
    done += len(driver.completed(0, requests - done))
    assert done == requests


def test_nothing_runs_where_nothing_is_to_do(driver: VirtioDriver, device: Entropy) -> None:
    """An idle device takes no processor time; a stopped one has no thread."""
    driver.start(device)
    driver.request(0, writable=[1])
    task = next(
        task
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text() == "entropy\n"
    )

    def is_idle() -> bool:
        before = (task / "schedstat").read_text()
        time.sleep(0.05)
        return (task / "schedstat").read_text() == before

    wait_for(is_idle, 10)
    driver.stop(device)
    assert not task.exists()


def test_a_broken_queue_fails_the_device(driver: VirtioDriver, device: Entropy) -> None:
    failed = threading.Event()
    reasons: list[str] = []

    def on_failure(reason: str) -> None:
        reasons.append(reason)
        failed.set()

    device.on_failure = on_failure
    driver.start(device)
    driver.request(0, writable=[1])
    driver.queues[0].make_available([Buffer(16 * MIB, 8, True)])
    driver.kick(0)
    assert failed.wait(10)
    assert reasons == ["a buffer outside of guest memory"]
    device.stop()
    driver.reset()
    driver.start(device)
    assert driver.request(0, writable=[16]).written == 16
    assert len(reasons) == 1


def test_a_driver_that_polls(driver: VirtioDriver, device: Entropy) -> None:
    device.start(driver.features, [dataclasses.replace(driver.queues[0].ring(), call=NO_CALL)])
    request = driver.submit(0, writable=[16])
    driver.kick(0)
    assert request
    wait_for(lambda: bool(driver.completed(0, 0, 0)), 10)
    assert not driver.queues[0].wait_call(0)


def test_rings_that_cannot_be(driver: VirtioDriver, device: Entropy) -> None:
    ring = driver.queues[0].ring()
    for bad, message in (
        (dataclasses.replace(ring, descriptors=16 * MIB), "a ring outside of guest memory"),
        (dataclasses.replace(ring, size=16), "a queue size"),
        (dataclasses.replace(ring, size=0), "a queue size"),
        (dataclasses.replace(ring, base=0x7FFF_7FFF), "a starting position"),
        (dataclasses.replace(ring, index=1), "queue 1 of the entropy device: use one of its 1"),
    ):
        with pytest.raises(RingError, match=message):
            device.start(driver.features, [bad])
        assert not device.running
    driver.start(device)
    assert driver.request(0, writable=[16]).written == 16


def test_a_driver_that_never_ends_does_not_hold_up_a_stop() -> None:
    """It makes the same chain available again and again, as fast as it can."""
    with VirtioDriver([8], Feature.INDIRECT_DESC) as driver:
        device = Entropy(driver.memory)
        ring = driver.queues[0]
        assert isinstance(ring, SplitQueue)
        driver.start(device)
        ring.write_descriptor(0, 8 * MIB, 1, 2, 0)
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                room = 8 - ((ring.next - ring.words[ring.used + 1]) & 0xFFFF)
                for _ in range(room):
                    ring.publish(0)
                os.eventfd_write(ring.kick, 1)

        thread = threading.Thread(target=flood)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        device.stop()
        took = time.monotonic() - began
        ended.set()
        thread.join()
        device.close()
        assert ring.words[ring.used + 1] > 100
        assert took < 2


def test_a_forked_process(driver: VirtioDriver, device: Entropy) -> None:
    """It has none of the threads, can let go of the device, and its parent notices nothing."""
    driver.start(device)

    def child() -> None:
        assert device.stop() == {}
        with pytest.raises(ForkedProcessError):
            driver.start(device)
        device.close()
        gc.collect()

    in_fork(child)
    assert driver.request(0, writable=[16]).written == 16


def test_closing_leaves_nothing(driver: VirtioDriver) -> None:
    before = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    device = Entropy(driver.memory)
    driver.start(device)
    device.close()
    device.close()
    wait_for(lambda: threading.active_count() == threads, 10)
    assert len(os.listdir("/proc/self/fd")) == before
