"""An input is what a snapshot says of a device, in JSON, as if somebody had changed it.

It is refused in one line, or the device is one that could have come about, and serves its guest.
"""

from __future__ import annotations

import json
from pathlib import Path

from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.pvpanic import Pvpanic
from pykvm.devices.ports import PortBus
from pykvm.devices.serial import Serial
from pykvm.errors import PykvmError
from pykvm.kvm import Io
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.system_ports import SystemPorts
from tests.rigs.fuzz.virtio_pci.harness import COMMON, ECAM, PLACES, Machine
from tests.rigs.messages import one_line


def try_input(data: bytes) -> None:
    try:
        state = json.loads(data[1:])
    except (ValueError, RecursionError):
        return  # the snapshot's reader refuses it
    try:
        match data[0] % 4:
            case 0:
                _restore_virtio(state)
            case 1:
                Pvpanic(lambda: None).restore(state)
            case 3:
                _restore_ports(state)
            case _:
                serial = Serial()
                try:
                    serial.restore(state)
                    saved = serial.save()
                    waiting = bytes.fromhex(state["input"]).hex()  # digits of either case
                    assert saved == {name: state[name] for name in saved} | {"input": waiting}
                finally:
                    serial.close()
    except PykvmError as error:
        one_line(error)


def _restore_ports(state: object) -> None:
    bus, pci = PortBus(), PciBus(ECAM, (0xC100_0000, 0x1000))
    config = MachineConfig(Path("kernel"))
    ports = SystemPorts(bus, config, pci, lambda status: None)
    ports.restore(state)
    assert bool(bus.devices) == (state is not None)
    for port in (0x511, 0xCF8, 0xCFC):
        for size in (1, 2, 4):
            assert len(bus.serve(Io(port, size, 3, is_write=False, data=b""))) == 3 * size
    json.dumps(ports.save())


def _restore_virtio(state: object) -> None:
    machine = Machine()
    try:
        machine.function.restore(state)
        assert machine.function.read_config(0, 4) == b"\xf4\x1a\x41\x10"
        machine.check()
        machine.bus.write(ECAM + 4, b"\6\0")
        for place in PLACES:
            machine.bus.read(place, 8)
        for queue in (0, 1):
            machine.bus.write(COMMON + 0x16, bytes([queue, 0]))
            machine.function.read_bar(machine.function.bars[0], 0, 0x38)
            machine.bus.write(COMMON + 0x1C, b"\1\0")
        machine.bus.write(COMMON + 0x14, b"\x0f")  # a driver that was about to start goes on
        machine.check()
        machine.function.pause()
        json.dumps(machine.function.save())
        machine.function.resume()
        machine.check()
        machine.bus.write(COMMON + 0x14, b"\0")
        machine.check()
    finally:
        machine.close()
