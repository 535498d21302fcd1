"""A device of a virtio bus is saved while its driver uses it, and another one goes on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.function import PciFunction, PciStateError
from pykvm.devices.pci.msix import MsiRoutes
from pykvm.devices.virtio.device import DeviceStateError, DeviceType, Feature, VirtioDevice
from pykvm.devices.virtio.entropy import Entropy
from pykvm.devices.virtio.pci import Status, VirtioPci
from pykvm.errors import PykvmError
from pykvm.kvm import IrqchipRoute
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.messages import one_line
from tests.rigs.virtio_driver import RING_FEATURES, VirtioDriver
from tests.rigs.virtio_pci import COMMON, ECAM, NOTIFY, TABLE, WINDOW, Kvm
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

SIZE = 8


class Machine:
    """A bus with one device, and what a driver and KVM have done there."""

    def __init__(self, memory: GuestMemory, device: VirtioDevice | None = None) -> None:
        self.kvm = Kvm()
        pins = [IrqchipRoute(gsi, 2, gsi) for gsi in range(24)]
        device = device or Entropy(memory)
        self.function = VirtioPci(device, MsiRoutes(self.kvm, pins), self.kvm)
        self.bus = PciBus(ECAM, WINDOW)
        self.bus.add(self.function)

    def put(self, gpa: int, size: int, value: int) -> None:
        assert self.bus.write(gpa, value.to_bytes(size, "little"))

    def get(self, gpa: int, size: int) -> int:
        data = self.bus.read(gpa, size)
        assert data is not None
        return int.from_bytes(data, "little")

    def set_up(self, driver: VirtioDriver) -> None:
        """Do what a driver's probe does."""
        self.put(ECAM + 4, 2, 6)  # memory, bus master
        self.put(ECAM + 0x42, 2, 0x8000)  # MSI-X on
        for vector in (0, 1):
            self.put(TABLE + 16 * vector, 4, 0xFEE0_0000)
            self.put(TABLE + 16 * vector + 8, 4, 0x30 + vector)
            self.put(TABLE + 16 * vector + 12, 4, 0)
        for status in (0, 1, 3):
            self.put(COMMON + 0x14, 1, status)
        for half in (0, 1):
            self.put(COMMON + 8, 4, half)
            self.put(COMMON + 12, 4, driver.features >> 32 * half & 0xFFFF_FFFF)
        self.put(COMMON + 0x14, 1, 11)
        self.put(COMMON + 0x10, 2, 0)
        ring = driver.queues[0].ring()
        self.put(COMMON + 0x18, 2, ring.size)
        self.put(COMMON + 0x1A, 2, 1)
        for at, address in ((0x20, ring.descriptors), (0x28, ring.driver), (0x30, ring.device)):
            self.put(COMMON + at, 4, address)
        self.put(COMMON + 0x1C, 2, 1)
        self.put(COMMON + 0x14, 1, 15)

    def kick(self) -> None:
        os.eventfd_write(self.kvm.ioevents[NOTIFY, 0], 1)

    def save(self) -> Any:
        self.function.pause()
        return json.loads(json.dumps(self.function.save()))

    def close(self) -> None:
        self.function.close()
        assert not self.kvm.ioevents
        assert not self.kvm.irqfds


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create(16 * MIB) as memory:
        yield memory


@pytest.fixture
def machine(memory: GuestMemory) -> Iterator[Machine]:
    made = Machine(memory)
    yield made
    made.close()


def drain(driver: VirtioDriver) -> None:
    """Wait until everything is used: the device's call goes to a vector, not to the driver."""

    def used() -> bool:
        driver.completed(0, 0, 0)
        return not driver.pending

    wait_for(used)


def ask(machine: Machine, driver: VirtioDriver) -> None:
    """Make a request, and check that it is answered."""
    request = driver.submit(0, writable=[16])
    assert request
    machine.kick()
    drain(driver)
    assert request.written == 16
    assert any(request.data)


@pytest.mark.parametrize("features", RING_FEATURES, ids=hex)
def test_another_device_goes_on(memory: GuestMemory, features: int) -> None:
    """Through several snapshots, with requests before, in between, and not yet kicked."""
    machine = Machine(memory)
    with VirtioDriver([SIZE], features, memory=memory) as driver:
        machine.set_up(driver)
        for _ in range(5):
            # More than a round of the ring, so that it has wrapped.
            for _ in range(SIZE + 3):
                ask(machine, driver)
            waiting = driver.submit(0, writable=[100])
            assert waiting
            state = machine.save()
            assert state["started"]
            routes = machine.kvm.irqfds
            assert len(routes) == 2
            before = machine
            machine = Machine(memory)
            machine.function.restore(state)
            before.close()
            assert len(machine.kvm.irqfds) == 2
            assert machine.get(COMMON + 0x14, 1) == 15
            assert machine.get(ECAM + 4, 2) == 6
            assert machine.get(TABLE + 16 + 8, 4) == 0x31
            drain(driver)
            assert waiting.written == 100
        machine.close()


def test_the_saved_one_can_go_on(memory: GuestMemory, machine: Machine) -> None:
    with VirtioDriver([SIZE], memory=memory) as driver:
        machine.set_up(driver)
        ask(machine, driver)
        for _ in range(3):
            machine.save()
            machine.function.pause()  # harmless twice
            machine.function.resume()
            machine.function.resume()
            ask(machine, driver)


def test_vectors(memory: GuestMemory, machine: Machine) -> None:
    """What was pending is pending again; each live vector is raised once more."""
    with VirtioDriver([SIZE], memory=memory) as driver:
        machine.set_up(driver)
        machine.put(TABLE + 16 * 1 + 12, 4, 1)  # masked
        machine.function.msix.raise_vector(1)
        state = machine.save()
        assert state["msix"]["pending"] == [1]
        other = Machine(memory)
        other.function.restore(state)
        assert other.get(TABLE + 0x800, 1) == 2
        assert os.eventfd_read(other.function.msix.eventfd(0)) == 1
        other.close()


def test_a_device_that_no_driver_has_touched(memory: GuestMemory, machine: Machine) -> None:
    state = machine.save()
    other = Machine(memory)
    other.function.restore(state)
    with VirtioDriver([SIZE], memory=memory) as driver:
        other.set_up(driver)
        ask(other, driver)
    assert other.function.msix.count == 2
    other.close()


def test_a_failed_device_stays_so(memory: GuestMemory, machine: Machine) -> None:
    with VirtioDriver([SIZE], memory=memory) as driver:
        machine.set_up(driver)
        machine.function.device.on_failure("broken")
        state = machine.save()
        other = Machine(memory)
        other.function.restore(state)
        assert other.get(COMMON + 0x14, 1) & Status.NEEDS_RESET
        driver.reset()
        other.set_up(driver)
        ask(other, driver)
        other.close()


class Stateful(VirtioDevice):
    """A device of which nobody has said that it can be saved."""

    type = DeviceType.FS
    queue_sizes = (8,)
    features = 0

    def start(self, features: int, rings: Sequence[Any]) -> None:
        pass

    def stop(self) -> dict[int, int]:
        return {}

    def close(self) -> None:
        pass


def test_a_device_that_cannot_be_saved(memory: GuestMemory, machine: Machine) -> None:
    other = Machine(memory, Stateful())
    with pytest.raises(DeviceStateError, match="virtio fs device") as caught:
        other.function.save()
    one_line(caught.value)
    other.close()
    with pytest.raises(DeviceStateError, match="virtio entropy device"):
        machine.function.restore({**machine.save(), "device": 5})


def test_other_devices(memory: GuestMemory, machine: Machine) -> None:
    state = machine.save()
    for other in (PciFunction((1, 2, 3, 4), 0), PciFunction((0x1AF4, 0x1044, 0x1AF4, 0x1100), 0)):
        with pytest.raises(PciStateError, match="another pci function: config") as caught:
            other.restore(state)
        one_line(caught.value)


def test_features_that_are_gone(memory: GuestMemory, machine: Machine) -> None:
    with VirtioDriver([SIZE], Feature.RING_PACKED, memory=memory) as driver:
        machine.set_up(driver)
        state = machine.save()
    device = Entropy(memory)
    device.features = int(Feature.EVENT_IDX)
    other = Machine(memory, device)
    with pytest.raises(PciStateError, match="features that this device has not"):
        other.function.restore(state)
    other.close()


def variations(state: Any) -> Iterator[Any]:
    """Yield copies of a state with something else in one place, or nothing."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        values: tuple[Any, ...] = (
            None,
            -1,
            1 << 64,
            "",
            "zz",
            "00",
            [],
            {},
            [[]],
            [[9, 0]],
            [[0]],
            0.5,
            ...,
        )
        for rubbish in values:
            changed = copy.deepcopy(state)
            if rubbish is ...:
                del changed[key]
            else:
                changed[key] = rubbish
            yield changed
        if isinstance(value, dict | list):
            for inner in variations(value):
                yield (
                    {**state, key: inner}
                    if isinstance(state, dict)
                    else [
                        *state[:key],
                        inner,
                        *state[key + 1 :],
                    ]
                )


def test_rubbish(memory: GuestMemory, machine: Machine) -> None:
    with VirtioDriver([SIZE], memory=memory) as driver:
        machine.set_up(driver)
        state = machine.save()
    refused = 0
    other = Machine(memory)
    for rubbish in variations(state):
        try:
            other.function.restore(rubbish)
        except PykvmError as error:
            one_line(error)
            refused += 1
        other.function.pause()
    other.close()
    assert refused > 200
