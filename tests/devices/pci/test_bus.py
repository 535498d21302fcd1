"""Configuration space and BARs of PCI functions, as a guest's accesses meet them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.devices.pci.bus import ECAM_SIZE, MAX_FUNCTIONS, PciBus, PciBusFullError
from pykvm.devices.pci.function import Bar, PciFunction

pytestmark = pytest.mark.unit

ECAM, WINDOW = 0xC000_0000, (0xC100_0000, 0x1_0000)
IDS = (0x1AF4, 0x1041, 0x1AF4, 0x1100)


class Memory(PciFunction):
    """A function with a BAR of 4 KiB that remembers what happens to it."""

    def __init__(self) -> None:
        super().__init__(IDS, 0x020000)
        self.bar = self.add_bar(0x1000)
        self.content = bytearray(0x1000)
        self.moves: list[int | None] = []

    def read_bar(self, bar: Bar, offset: int, size: int) -> bytes:
        return bytes(self.content[offset : offset + size])

    def write_bar(self, bar: Bar, offset: int, data: bytes) -> None:
        assert offset + len(data) <= bar.size
        self.content[offset : offset + len(data)] = data

    def bar_moved(self, bar: Bar) -> None:
        self.moves.append(bar.gpa)


def bus_with(*functions: PciFunction) -> PciBus:
    bus = PciBus(ECAM, WINDOW)
    for function in functions:
        bus.add(function)
    return bus


def config(device: int, offset: int) -> int:
    return ECAM + (device << 15) + offset


def word(bus: PciBus, gpa: int, size: int = 4) -> int:
    data = bus.read(gpa, size)
    assert data is not None
    assert len(data) == size
    return int.from_bytes(data, "little")


def put(bus: PciBus, gpa: int, value: int, size: int = 4) -> None:
    assert bus.write(gpa, value.to_bytes(size, "little"))


def test_identity() -> None:
    bus = bus_with(Memory())
    assert word(bus, config(0, 0)) == 0x1041_1AF4
    assert word(bus, config(0, 8)) == 0x0200_0001
    assert word(bus, config(0, 0x2C)) == 0x1100_1AF4
    assert word(bus, config(0, 0x0E), 1) == 0  # header type: one function
    put(bus, config(0, 0), 0)
    assert word(bus, config(0, 0)) == 0x1041_1AF4
    assert word(bus, config(0, 0x100)) == 0  # no extended capabilities


@pytest.mark.parametrize("gpa", [config(1, 0), config(31, 0), config(0, 0) + 0x1000])
def test_nothing_there(gpa: int) -> None:
    bus = bus_with(Memory())
    assert word(bus, gpa) == 0xFFFF_FFFF
    put(bus, gpa, 0)
    assert bus.read(0x1234, 4) is None
    assert not bus.write(ECAM + ECAM_SIZE, b"x")


def test_a_bar_is_sized_moved_and_switched_off() -> None:
    function = Memory()
    bus = bus_with(Memory(), function)
    register = config(1, 0x10)
    assert word(bus, register) == WINDOW[0] + 0x1000
    put(bus, register, 0xFFFF_FFFF)
    assert word(bus, register) == 0xFFFF_F000
    assert function.moves == []
    put(bus, register, 0xD000_0000)
    put(bus, config(1, 4), 2, 2)
    put(bus, 0xD000_0FFC, 0x1234_5678)
    assert word(bus, 0xD000_0FFC) == 0x1234_5678
    assert bus.read(0xD000_0FFE, 4) is None  # over its end
    put(bus, config(1, 4), 0, 2)
    assert bus.read(0xD000_0000, 4) is None
    assert function.moves == [0xD000_0000, None]


def test_two_bars_at_one_address() -> None:
    """A guest may do that; the first one answers, and nothing breaks."""
    one, two = Memory(), Memory()
    bus = bus_with(one, two)
    for device in (0, 1):
        put(bus, config(device, 0x10), 0xD000_0000)
        put(bus, config(device, 4), 2, 2)
    put(bus, 0xD000_0000, 7)
    assert (one.content[0], two.content[0]) == (7, 0)


def test_capabilities_are_linked() -> None:
    function = Memory()
    first = function.add_capability(0x11, b"\1\2\3")
    second = function.add_capability(0x09, b"\4\5", b"\x0f\xff")
    assert (first, second) == (0x40, 0x48)
    assert function.read_config(0x34, 1) == b"\x40"
    assert function.read_config(6, 1)[0] & 0x10
    assert function.read_config(0x40, 5) == b"\x11\x48\1\2\3"
    function.write_config(0x40, b"\xff" * 12)
    assert function.read_config(0x40, 5) == b"\x11\x48\1\2\3"
    assert function.read_config(0x48, 4) == b"\x09\x00\x0f\xff"


def test_a_full_bus() -> None:
    bus = PciBus(ECAM, (WINDOW[0], 0x2000))
    bus.add(Memory())
    bus.add(Memory())
    with pytest.raises(PciBusFullError, match="no room for another 4 KiB"):
        bus.add(Memory())
    bus = PciBus(ECAM, (WINDOW[0], 1 << 20))
    for number in range(MAX_FUNCTIONS):
        assert bus.add(Memory()) == number
    with pytest.raises(PciBusFullError, match="another device"):
        bus.add(Memory())


@given(st.lists(st.tuples(st.integers(0, 0xFFF), st.binary(min_size=1, max_size=8))))
def test_any_writes_to_configuration(writes: list[tuple[int, bytes]]) -> None:
    """Identity, sizes and links stay; a BAR is always aligned."""
    function = Memory()
    function.add_capability(0x11, bytes(10), b"\0\xc0")
    fixed = [(0, 4), (8, 4), (0x0E, 1), (0x2C, 8), (0x40, 2)]
    before = [function.read_config(*place) for place in fixed]
    for offset, data in writes:
        function.write_config(offset, data)
        for gpa in function.moves:
            assert gpa is None or gpa % 0x1000 == 0
    assert [function.read_config(*place) for place in fixed] == before
    assert int.from_bytes(function.read_config(0x10, 4), "little") % 0x1000 == 0
