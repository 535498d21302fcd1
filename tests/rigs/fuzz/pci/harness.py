"""An input is a sequence of a guest's accesses to a PCI bus: by ECAM, by ports, to BARs.

No access fails, and each read has as many bytes as the guest wants. A function's identity, its
capabilities and the size of its BARs stay as they are. A BAR is reached only while the guest lets
it, where its register says, and never beyond its end.
"""

from __future__ import annotations

from pykvm.devices.pci.bus import ECAM_SIZE, PciBus
from pykvm.devices.pci.function import Bar, PciFunction
from pykvm.devices.pci.ports import ConfigPorts
from pykvm.devices.pci.pvpanic import Pvpanic
from pykvm.devices.ports import PortBus
from pykvm.kvm import Io
from tests.rigs.fuzz.inputs import Input

ECAM, WINDOW = 0xC000_0000, (0xC100_0000, 0x10_0000)
IDS = (0x1AF4, 0x1041, 0x1AF4, 0x1100)
SIZES = (16, 0x1000, 0x4000)

_COMMAND, _BARS, _STATUS = 4, 0x10, 6


class Function(PciFunction):
    """A function with several BARs and capabilities, which checks what reaches it."""

    def __init__(self, bars: int) -> None:
        super().__init__(IDS, 0x020000)
        for size in SIZES[:bars]:
            self.add_bar(size)
        self.add_capability(0x09, bytes(range(20)), bytes(4) + b"\xff\x0f")
        self.add_capability(0x11, bytes(10), b"\0\xc0")

    def read_bar(self, bar: Bar, offset: int, size: int) -> bytes:
        self._check(bar, offset, size)
        return bytes([offset & 0xFF]) * size

    def write_bar(self, bar: Bar, offset: int, data: bytes) -> None:
        self._check(bar, offset, len(data))

    def bar_moved(self, bar: Bar) -> None:
        assert bar.gpa is None or not bar.gpa % bar.size

    def _check(self, bar: Bar, offset: int, size: int) -> None:
        assert bar in self.bars
        assert 0 <= offset < offset + size <= bar.size
        assert self.read_config(_COMMAND, 1)[0] & 2, "memory is off"
        register = int.from_bytes(self.read_config(_BARS + 4 * bar.index, 4), "little")
        assert bar.gpa == register


class Machine:
    """A bus with its ports."""

    def __init__(self) -> None:
        self.pci = PciBus(ECAM, WINDOW)
        self.functions: list[PciFunction] = [Function(3), Pvpanic(lambda: None), Function(1)]
        for function in self.functions:
            self.pci.add(function)
        self.ports = PortBus()
        self.ports.add(ConfigPorts(self.pci))
        self.fixed = [_fixed(function) for function in self.functions]

    def address(self, given: Input) -> int:
        """Return a GPA: of configuration space, of a BAR, or any."""
        match given.number() % 4:
            case 0:
                function, register = given.number() % 6, given.number(2) % 4096
                return ECAM + (function << 15) + register
            case 1:
                function, number = given.number() % 3, given.number()
                bars = self.functions[function].bars
                bar = bars[number % len(bars)]
                edge = bar.size if number & 0x80 else 0  # near its end, or its start
                return (bar.gpa or 0) + edge + (given.number() >> (3 if edge else 0)) - 16
            case 2:
                return ECAM + given.number(3) % (ECAM_SIZE + 16)
            case _:
                return given.number(8) >> given.number() % 64

    def read_port(self, port: int, size: int) -> int:
        """Return what the guest reads."""
        reply = self.ports.serve(Io(port, size, 1, is_write=False, data=b""))
        assert len(reply) == size
        return int.from_bytes(reply, "little")

    def check(self) -> None:
        """Check what must hold after every access."""
        for number, function in enumerate(self.functions):
            assert _fixed(function) == self.fixed[number]
            enabled = function.read_config(_COMMAND, 1)[0] & 2
            for bar in function.bars:
                register = int.from_bytes(function.read_config(_BARS + 4 * bar.index, 4), "little")
                assert not register & bar.size - 1
                assert bar.gpa == (register if enabled else None)


def _fixed(function: PciFunction) -> bytes:
    """Return what no guest can change: all but the command, the BARs and scratch registers."""
    config = bytearray(function.read_config(0, 256))
    config[_COMMAND : _COMMAND + 2] = bytes(2)
    config[_BARS : _BARS + 12] = bytes(12)
    config[0x0C] = config[0x3C] = 0
    if isinstance(function, Function):
        config[0x46:0x48] = bytes(2)
        config[0x5B] &= 0x3F
    return bytes(config)


def try_input(data: bytes) -> None:
    given = Input(data)
    machine = Machine()
    while given:
        step = given.number()
        size = 1 << step // 4 % 4
        match step % 4:
            case 0:
                _read(machine, machine.address(given), size)
            case 1:
                gpa = machine.address(given)
                served = machine.pci.write(gpa, given.take(size))
                assert served or not 0 <= gpa - ECAM < ECAM_SIZE
            case 2:
                _read_port(machine, 0xCF8 + given.number() % 8, min(size, 4))
            case _:
                port, content = 0xCF8 + given.number() % 8, given.take(min(size, 4))
                machine.ports.serve(Io(port, len(content), 1, is_write=True, data=content))
        machine.check()


def _read(machine: Machine, gpa: int, size: int) -> None:
    found = machine.pci.read(gpa, size)
    assert found is None or len(found) == size
    if 0 <= gpa - ECAM < ECAM_SIZE:
        assert found is not None
        device, number = (gpa - ECAM) >> 15, (gpa - ECAM) >> 12 & 7
        if number or device >= len(machine.functions):
            assert found == b"\xff" * size, "a function that is not there"


def _read_port(machine: Machine, port: int, size: int) -> None:
    """Read a port: it is the address, or the same that ECAM has, or nothing."""
    address = machine.read_port(0xCF8, 4)
    assert not address & 0x7F00_0003
    wanted = (1 << 8 * size) - 1
    if port == 0xCF8 and size == 4:
        wanted = address
    elif port >= 0xCFC and port + size <= 0xD00 and address >> 31 and not address & 0xFF_0000:
        place = (address & 0xFF00) << 4 | (address & 0xFC) + port - 0xCFC
        wanted = int.from_bytes(machine.pci.read(ECAM + place, size) or b"", "little")
    assert machine.read_port(port, size) == wanted
