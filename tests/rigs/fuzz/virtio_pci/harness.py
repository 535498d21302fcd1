"""An input is a sequence of a guest's accesses to a virtio device's registers, and of snapshots.

No access fails. The device is started only with features that it offers and with rings that it
allows, never twice, and stopped by a reset. KVM is asked for no interrupt and no notification
twice, and has none left in the end. A snapshot, restored, is the same device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.msix import MsiRoutes
from pykvm.devices.virtio.device import NO_CALL, DeviceType, Feature, Ring, VirtioDevice
from pykvm.devices.virtio.pci import VirtioPci
from pykvm.errors import PykvmError
from pykvm.kvm import IoctlError, IrqchipRoute, MsiRoute
from tests.rigs.fuzz.inputs import Input

ECAM, WINDOW = 0xC000_0000, (0xC100_0000, 0x10_0000)
COMMON, ISR, CONFIG, NOTIFY, TABLE = (WINDOW[0] + at for at in (0, 0x1000, 0x2000, 0x3000, 0x4000))
PLACES = (ECAM, COMMON, ISR, CONFIG, NOTIFY, TABLE, TABLE + 0x800)
STATUS = COMMON + 0x14

VERSION_1 = int(Feature.VERSION_1)
OFFERED = int(1 << 5 | Feature.EVENT_IDX | Feature.RING_PACKED)
DRIVER_OK, FEATURES_OK, NEEDS_RESET = 4, 8, 64


class Kvm:
    """Refuses what KVM refuses, and what no transport should ask for."""

    def __init__(self) -> None:
        self.ioevents: dict[int, int] = {}
        self.irqfds: dict[int, int] = {}
        self.routes: dict[int, IrqchipRoute | MsiRoute] = {}

    def require(self, name: str, what: str) -> int:
        return 64

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        routes = list(routes)
        if any(isinstance(one, MsiRoute) and one.address >> 32 for one in routes):
            raise IoctlError("KVM_SET_GSI_ROUTING", 22)
        self.routes = {one.gsi: one for one in routes}
        assert len(self.routes) == len(routes) <= 64

    def register_irqfd(self, eventfd: int, gsi: int) -> None:
        assert eventfd not in self.irqfds
        assert isinstance(self.routes[gsi], MsiRoute)
        self.irqfds[eventfd] = gsi

    def unregister_irqfd(self, eventfd: int, gsi: int) -> None:
        assert self.irqfds.pop(eventfd) == gsi

    def register_ioevent(self, eventfd: int, address: int, size: int) -> None:
        assert size == 0
        if address in self.ioevents:
            raise IoctlError("KVM_IOEVENTFD", 17)
        self.ioevents[address] = eventfd

    def unregister_ioevent(self, eventfd: int, address: int, size: int) -> None:
        assert self.ioevents.pop(address) == eventfd


class Checker(VirtioDevice):
    """A device that checks how it is started, and refuses rings at GPA 0."""

    type = DeviceType.NET
    queue_sizes = (256, 64)
    features: int = OFFERED
    stateless = True

    def __init__(self) -> None:
        super().__init__()
        self.rings: list[Ring] | None = None
        self.machine: Machine | None = None

    def config(self) -> bytes:
        return b"\2\0\0\0\0\1"

    def write_config(self, offset: int, data: bytes) -> None:
        assert 0 <= offset < offset + len(data) <= 0x1000
        self.on_config()

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        assert self.rings is None, "started twice"
        assert features & VERSION_1
        assert not features & ~(OFFERED | VERSION_1)
        assert len({ring.index for ring in rings}) == len(rings)
        packed = bool(features & Feature.RING_PACKED)
        for ring in rings:
            assert 1 <= ring.size <= self.queue_sizes[ring.index]
            assert packed or not ring.size & ring.size - 1
            assert 0 <= ring.base < 1 << 32
            os.eventfd_write(ring.kick, 1)
            if ring.call != NO_CALL:
                os.eventfd_write(ring.call, 1)
        if any(not ring.descriptors for ring in rings):
            raise PykvmError("a ring at GPA 0", "put it elsewhere")
        self.rings = list(rings)

    def stop(self) -> dict[int, int]:
        rings, self.rings = self.rings or [], None
        return {ring.index: ring.base ^ 1 for ring in rings}

    def close(self) -> None:
        self.stop()


class Machine:
    """One device on a bus."""

    def __init__(self) -> None:
        self.kvm = Kvm()
        self.device = Checker()
        pins = [IrqchipRoute(gsi, 2, gsi) for gsi in range(24)]
        self.function = VirtioPci(self.device, MsiRoutes(self.kvm, pins), self.kvm)
        self.bus = PciBus(ECAM, WINDOW)
        self.bus.add(self.function)

    def check(self) -> None:
        """Check what must hold after every access."""
        status = self.function.read_bar(self.function.bars[0], 0x14, 1)[0]
        if self.device.rings is not None:
            assert status & DRIVER_OK
            assert status & FEATURES_OK
        base = self.function.bars[0].gpa
        allowed = set() if base is None else {base + 0x3000 + 4 * queue for queue in (0, 1)}
        assert set(self.kvm.ioevents) <= allowed
        # No interrupt while the guest has switched them off (6.8.2).
        control = int.from_bytes(self.function.read_config(0x42, 2), "little")
        assert self.function.read_config(0x40, 1) == b"\x11"
        assert control & 0xC000 == 0x8000 or not self.kvm.irqfds

    def restored(self) -> Machine:
        """Return a new machine with the state of this one, which is closed."""
        self.function.pause()
        state = json.loads(json.dumps(self.function.save()))
        other = Machine()
        other.function.restore(state)
        other.function.pause()
        again = other.function.save()
        other.function.resume()
        # Both sides are told once more, so that more may be pending.
        assert set(state["msix"].pop("pending")) <= set(again["msix"].pop("pending"))
        # A device that has failed goes on nowhere.
        rings, same = ([pair[0] for pair in one.pop("bases")] for one in (state, again))
        assert rings == same or state["failed"]
        assert json.loads(json.dumps(again)) == state
        self.close()
        return other

    def close(self) -> None:
        self.function.close()
        assert self.device.rings is None
        assert not self.kvm.ioevents
        assert not self.kvm.irqfds


def try_input(data: bytes) -> None:
    given = Input(data)
    machine, snapshots = Machine(), 0
    try:
        machine.bus.write(ECAM + 4, b"\6\0")
        while given:
            step = given.number()
            size = 1 << step // 8 % 4
            place = PLACES[step // 32 % len(PLACES)]
            match step % 8:
                case 0 | 1 | 2:
                    machine.bus.write(place + given.number(), given.take(size))
                case 3 | 4:
                    found = machine.bus.read(place + given.number(), size)
                    assert found is None or len(found) == size
                case 5:
                    _set_up(machine, given)
                case 6:
                    machine.bus.write(STATUS, given.take(1))
                case _:
                    if size == 8 and snapshots < 3:
                        machine, snapshots = machine.restored(), snapshots + 1
                    elif size == 4:
                        machine.function.pause()
                        machine.function.resume()
                    elif size == 2:
                        machine.device.on_failure("it fails")
            machine.check()
    finally:
        machine.close()


def _set_up(machine: Machine, given: Input) -> None:
    """Set up a queue as drivers do, but with any values."""
    put = machine.bus.write
    put(COMMON + 0x16, bytes([given.number() % 3, 0]))
    put(COMMON + 0x18, given.take(2))
    put(COMMON + 0x1A, bytes([given.number() % 4, 0]))
    for offset in (0x20, 0x28, 0x30):
        put(COMMON + offset, given.take(2) + bytes(6))
    put(COMMON + 0x1C, b"\1\0")
