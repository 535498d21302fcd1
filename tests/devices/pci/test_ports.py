"""Configuration space by ports: the same that ECAM shows, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.function import PciFunction
from pykvm.devices.pci.ports import ConfigPorts
from pykvm.devices.ports import PortBus
from pykvm.kvm import Io

pytestmark = pytest.mark.unit

ADDRESS, DATA = 0xCF8, 0xCFC
ENABLE = 1 << 31
ECAM = 0xC000_0000
IDS = (0x1AF4, 0x1041, 0x1AF4, 0x1100)


class Machine:
    """Two functions on a bus, with its ports."""

    def __init__(self) -> None:
        self.pci = PciBus(ECAM, (0xC100_0000, 0x1_0000))
        for _ in range(2):
            function = PciFunction(IDS, 0x020000)
            function.add_bar(0x1000)
            self.pci.add(function)
        self.bus = PortBus()
        self.bus.add(ConfigPorts(self.pci))

    def read(self, port: int, size: int = 4) -> int:
        return int.from_bytes(self.bus.serve(Io(port, size, 1, is_write=False, data=b"")), "little")

    def write(self, port: int, value: int, size: int = 4) -> None:
        data = value.to_bytes(size, "little")
        assert self.bus.serve(Io(port, size, 1, is_write=True, data=data)) == b""


def test_what_linux_looks_for() -> None:
    """The address register keeps what is written by four bytes, and nothing narrower."""
    machine = Machine()
    machine.write(0xCFB, 1, 1)
    assert machine.read(ADDRESS) == 0
    machine.write(ADDRESS, ENABLE)
    assert machine.read(ADDRESS) == ENABLE
    machine.write(ADDRESS, 0, 2)
    machine.write(0xCF9, 6, 1)
    assert machine.read(ADDRESS) == ENABLE
    assert machine.read(ADDRESS, 1) == 0xFF
    machine.write(ADDRESS, 0xFFFF_FFFF)
    assert machine.read(ADDRESS) == ENABLE | 0xFF_FFFC


def test_reads_and_writes() -> None:
    machine = Machine()
    machine.write(ADDRESS, ENABLE | 1 << 11)
    assert machine.read(DATA) == 0x1041_1AF4
    assert machine.read(DATA + 2, 2) == 0x1041
    assert machine.read(DATA + 3, 1) == 0x10
    machine.write(ADDRESS, ENABLE | 1 << 11 | 0x10)
    machine.write(DATA, 0xFFFF_FFFF)
    assert machine.read(DATA) == 0xFFFF_F000
    machine.write(ADDRESS, ENABLE | 0x10)
    assert machine.read(DATA) == 0xC100_0000


@pytest.mark.parametrize(
    "address",
    [1 << 11, ENABLE | 1 << 16, ENABLE | 1 << 8, ENABLE | 2 << 11, ENABLE | 31 << 11],
    ids=["not enabled", "another bus", "another function", "no device", "the last device"],
)
def test_nothing_is_there(address: int) -> None:
    machine = Machine()
    machine.write(ADDRESS, address)
    machine.write(DATA, 0)
    assert machine.read(DATA) == 0xFFFF_FFFF


def test_across_the_end_of_the_window() -> None:
    machine = Machine()
    machine.write(ADDRESS, ENABLE)
    assert machine.read(DATA + 1, 4) == 0xFFFF_FFFF
    assert machine.read(DATA + 3, 2) == 0xFFFF


@given(st.integers(0, 0xFFFF_FFFF), st.integers(ADDRESS, DATA + 3), st.sampled_from([1, 2, 4]))
def test_as_ecam_shows_it(address: int, port: int, size: int) -> None:
    machine = Machine()
    machine.write(ADDRESS, address)
    place = (address & 0xFF00) << 4 | (address & 0xFC) + port - DATA
    if port < DATA or port + size > DATA + 4 or address & 0xFF_0000 or not address & ENABLE:
        wanted = (1 << 8 * size) - 1
        if port == ADDRESS and size == 4:
            wanted = address & 0x80FF_FFFC
    else:
        data = machine.pci.read(ECAM + place, size)
        assert data is not None
        wanted = int.from_bytes(data, "little")
    assert machine.read(port, size) == wanted
