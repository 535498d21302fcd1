"""The registers of virtio over PCI, as drivers that keep the rules use them, and as others do."""

import os
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.msix import MsiRoutes
from pykvm.devices.virtio.device import DeviceType, Feature, Ring, VirtioDevice
from pykvm.devices.virtio.pci import Status, VirtioPci
from pykvm.errors import PykvmError
from pykvm.kvm import IrqchipRoute
from tests.rigs.virtio_pci import COMMON, CONFIG, ECAM, ISR, NOTIFY, TABLE, WINDOW, Kvm

pytestmark = pytest.mark.unit

OFFERED = 1 << 5 | Feature.EVENT_IDX


class Recorder(VirtioDevice):
    """A device that remembers how it was started, and refuses rings at GPA 0."""

    type = DeviceType.NET
    queue_sizes = (256, 64)
    features: int = OFFERED

    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray(b"\2\0\0\0\0\1")
        self.started: tuple[int, list[Ring]] | None = None
        self.stops = 0

    def config(self) -> bytes:
        return bytes(self.content)

    def write_config(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        assert self.started is None
        if any(not ring.descriptors for ring in rings):
            raise PykvmError("a ring at GPA 0")
        self.started = (features, list(rings))

    def stop(self) -> dict[int, int]:
        self.stops += 1
        self.started = None
        return {}

    def close(self) -> None:
        self.stop()


class Driver:
    """A guest's accesses to one device."""

    def __init__(self, more_features: int = 0) -> None:
        self.kvm = Kvm()
        self.device = Recorder()
        self.device.features = OFFERED | more_features
        pins = [IrqchipRoute(gsi, 2, gsi) for gsi in range(24)]
        self.function = VirtioPci(self.device, MsiRoutes(self.kvm, pins), self.kvm)
        self.bus = PciBus(ECAM, WINDOW)
        self.bus.add(self.function)
        self.put(ECAM + 4, 2, 6)  # memory, bus master

    def get(self, gpa: int, size: int = 4) -> int:
        data = self.bus.read(gpa, size)
        assert data is not None
        assert len(data) == size
        return int.from_bytes(data, "little")

    def put(self, gpa: int, size: int, value: int) -> None:
        assert self.bus.write(gpa, value.to_bytes(size, "little"))

    def negotiate(self, features: int = OFFERED | Feature.VERSION_1) -> bool:
        self.put(COMMON + 0x14, 1, 0)
        self.put(COMMON + 0x14, 1, 3)
        for half in (0, 1):
            self.put(COMMON + 8, 4, half)
            self.put(COMMON + 12, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.put(COMMON + 0x14, 1, 11)
        return bool(self.get(COMMON + 0x14, 1) & Status.FEATURES_OK)

    def set_up(self, queue: int, first: int, *, size: int = 64, vector: int = 1) -> None:
        self.put(COMMON + 0x16, 2, queue)
        self.put(COMMON + 0x18, 2, size)
        self.put(COMMON + 0x1A, 2, vector)
        for number in range(3):
            self.put(COMMON + 0x20 + 8 * number, 4, first + 0x1000 * number)
            self.put(COMMON + 0x24 + 8 * number, 4, 1)
        self.put(COMMON + 0x1C, 2, 1)

    def close(self) -> None:
        self.function.close()
        assert not self.kvm.ioevents
        assert not self.kvm.irqfds


@pytest.fixture
def driver() -> Iterable[Driver]:
    made = Driver()
    yield made
    made.close()


def capabilities(driver: Driver) -> list[tuple[int, bytes]]:
    found, at = [], driver.get(ECAM + 0x34, 1)
    while at:
        size = driver.get(ECAM + at + 2, 1) if driver.get(ECAM + at, 1) == 9 else 12
        found.append(
            (driver.get(ECAM + at, 1), bytes(driver.get(ECAM + at + n, 1) for n in range(size)))
        )
        at = driver.get(ECAM + at + 1, 1)
    return found


def test_what_a_driver_looks_for(driver: Driver) -> None:
    assert driver.get(ECAM, 4) == 0x1041_1AF4
    assert driver.get(ECAM + 0x0A, 2) == 0x0200
    found = capabilities(driver)
    assert [number for number, _ in found] == [0x11, 9, 9, 9, 9, 9]
    kinds = {body[3]: int.from_bytes(body[8:12], "little") for number, body in found if number == 9}
    assert kinds == {1: 0, 2: 0x3000, 3: 0x1000, 4: 0x2000, 5: 0}
    assert driver.get(COMMON + 0x12, 2) == 2
    assert driver.get(CONFIG, 4) == 2


def test_a_driver_that_keeps_the_rules(driver: Driver) -> None:
    for half, bits in ((0, OFFERED), (1, 1), (2, 0)):
        driver.put(COMMON, 4, half)
        assert driver.get(COMMON + 4) == bits
    assert driver.negotiate()
    driver.put(COMMON + 0x16, 2, 0)
    assert driver.get(COMMON + 0x18, 2) == 256
    driver.set_up(0, 0x1000)
    driver.set_up(1, 0x8000, vector=0xFFFF)
    driver.put(COMMON + 0x14, 1, 15)
    assert driver.get(COMMON + 0x14, 1) == 15
    assert driver.device.started
    features, (first, second) = driver.device.started
    assert features == OFFERED | Feature.VERSION_1
    assert (first.index, first.size, first.base) == (0, 64, 0)
    assert (first.descriptors, first.driver, first.device) == (
        1 << 32 | 0x1000,
        1 << 32 | 0x2000,
        1 << 32 | 0x3000,
    )
    assert first.call == driver.function.msix.eventfd(1)
    assert second.call == -1
    # Notifications go past us: KVM writes the eventfds.
    assert driver.kvm.ioevents == {(NOTIFY, 0): first.kick, (NOTIFY + 4, 0): second.kick}
    driver.put(COMMON + 0x14, 1, 0)
    assert driver.device.started is None
    assert driver.get(COMMON + 0x14, 1) == 0
    driver.put(COMMON + 0x16, 2, 0)
    assert driver.get(COMMON + 0x1C, 2) == 0


def test_registers_that_do_not_change_while_it_runs(driver: Driver) -> None:
    driver.negotiate()
    driver.set_up(0, 0x1000)
    driver.put(COMMON + 0x14, 1, 15)
    driver.set_up(0, 0x9000, size=16)
    assert driver.get(COMMON + 0x18, 2) == 64
    assert driver.get(COMMON + 0x20) == 0x1000
    driver.put(COMMON + 8, 4, 0)
    driver.put(COMMON + 12, 4, 0)
    assert driver.get(COMMON + 12) == OFFERED


@pytest.mark.parametrize("features", [OFFERED, Feature.VERSION_1 | 1, Feature.VERSION_1 | 1 << 40])
def test_features_that_were_not_offered(driver: Driver, features: int) -> None:
    assert not driver.negotiate(features)
    driver.put(COMMON + 0x14, 1, 15)
    assert driver.device.started is None


def test_packed_rings_begin_with_both_wrap_counters() -> None:
    driver = Driver(Feature.RING_PACKED)
    driver.negotiate(Feature.RING_PACKED | Feature.VERSION_1)
    driver.set_up(0, 0x1000, size=255)
    driver.put(COMMON + 0x14, 1, 15)
    assert driver.device.started
    ring = driver.device.started[1][0]
    assert (ring.size, ring.base) == (255, 0x8000_8000)
    driver.close()


def test_a_ring_that_the_device_refuses(driver: Driver) -> None:
    driver.negotiate()
    driver.put(COMMON + 0x10, 2, 0)
    driver.put(COMMON + 0x16, 2, 0)
    driver.put(COMMON + 0x1C, 2, 1)
    driver.put(COMMON + 0x14, 1, 15)
    assert driver.get(COMMON + 0x14, 1) & Status.NEEDS_RESET
    assert driver.negotiate()
    assert not driver.get(COMMON + 0x14, 1) & Status.NEEDS_RESET


def test_a_device_that_fails_or_changes(driver: Driver) -> None:
    driver.negotiate()
    driver.put(COMMON + 0x10, 2, 2)
    driver.set_up(0, 0x1000)
    driver.put(COMMON + 0x14, 1, 15)
    before = driver.get(COMMON + 0x15, 1)
    driver.device.on_config()
    assert driver.get(COMMON + 0x15, 1) == before + 1
    assert os.eventfd_read(driver.function.msix.eventfd(2)) == 1
    told: list[str] = []
    driver.function.tell = told.append
    driver.device.on_failure("gone")
    assert told == ["a net device has failed: gone"]
    assert driver.get(COMMON + 0x14, 1) & Status.NEEDS_RESET
    assert os.eventfd_read(driver.function.msix.eventfd(2)) == 1


def test_the_window_in_configuration_space(driver: Driver) -> None:
    at = ECAM + driver.function._window
    driver.put(at + 4, 1, 0)
    driver.put(at + 8, 4, 0x12)
    driver.put(at + 12, 4, 2)
    assert driver.get(at + 16, 2) == 2  # number of queues
    driver.put(at + 8, 4, 0x14)
    driver.put(at + 12, 4, 1)
    driver.put(at + 16, 1, 3)
    assert driver.get(COMMON + 0x14, 1) == 3
    for bar, offset, size in ((7, 0, 4), (0, 0x4000, 4), (0, 2, 4), (0, 0, 3), (1, 0xFFE, 4)):
        driver.put(at + 4, 1, bar)
        driver.put(at + 8, 4, offset)
        driver.put(at + 12, 4, size)
        driver.get(at + 16, 4)
        driver.put(at + 16, 4, 0xFFFF_FFFF)
    assert driver.get(COMMON + 0x14, 1) == 3


def test_a_notification_that_kvm_could_not_take(driver: Driver) -> None:
    """Where another BAR's ioeventfd is already, the write comes to us."""
    driver.put(ECAM + 4, 2, 0)
    driver.kvm.ioevents[NOTIFY + 4, 0] = -1
    driver.put(ECAM + 4, 2, 6)
    driver.put(NOTIFY + 4, 2, 1)
    assert os.eventfd_read(driver.function._queues[1].kick) == 1
    del driver.kvm.ioevents[NOTIFY + 4, 0]


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from([ECAM, COMMON, COMMON, ISR, CONFIG, NOTIFY, TABLE, TABLE + 0x800]),
        st.integers(0, 0x7F),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1)),
        st.booleans(),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(ACCESSES)
def test_any_accesses(accesses: list[tuple[int, int, int, int, bool]]) -> None:
    """Nothing raises, whatever a guest does; what is started was set up, within what is offered."""
    driver = Driver()
    for base, offset, size, value, write in accesses:
        if write:
            driver.bus.write(base + offset, (value % (1 << 8 * size)).to_bytes(size, "little"))
        else:
            data = driver.bus.read(base + offset, size)
            assert data is None or len(data) == size
        if driver.device.started:
            features, rings = driver.device.started
            assert not features & ~(OFFERED | Feature.VERSION_1)
            for ring in rings:
                assert 1 <= ring.size <= driver.device.queue_sizes[ring.index]
    driver.close()
