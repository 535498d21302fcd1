"""Devices with I/O ports: who answers, one access after the other."""

import pytest

from pykvm.devices.debug_exit import DebugExit, ExitPortError
from pykvm.devices.firmware_config import FirmwareConfig
from pykvm.devices.ports import PortBus, PortOverlapError
from pykvm.kvm import Io
from pykvm.sizes import MIB

pytestmark = pytest.mark.unit


def read(bus: PortBus, port: int, size: int = 1, count: int = 1) -> bytes:
    return bus.serve(Io(port, size, count, is_write=False, data=b""))


def write(bus: PortBus, port: int, data: bytes, size: int = 0) -> None:
    size = size or len(data)
    assert bus.serve(Io(port, size, len(data) // size, is_write=True, data=data)) == b""


def test_nothing_is_there() -> None:
    bus = PortBus()
    assert read(bus, 0x80, 2, 3) == b"\xff" * 6
    write(bus, 0x80, b"abc")


def test_ports_are_not_shared() -> None:
    bus = PortBus()
    first = DebugExit(print, 0x500, 4)
    bus.add(first)
    for port in (0x4FD, 0x500, 0x503):
        with pytest.raises(PortOverlapError):
            bus.add(DebugExit(print, port, 4))
    bus.add(DebugExit(print, 0x504, 4))
    bus.add(DebugExit(print, 0x4FC, 4))
    assert len(bus.devices) == 3


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"\0", 1), (b"\x15\0\0\0", 43), (b"\x7f", 255), (b"\x80\0", 1), (b"\xff\xff", 255)],
)
def test_debug_exit(data: bytes, status: int) -> None:
    bus = PortBus()
    ends: list[int] = []
    bus.add(DebugExit(ends.append))
    assert read(bus, 0xF4, 4) == bytes(4)
    assert ends == []
    write(bus, 0xF4, data)
    write(bus, 0xF7, data)
    write(bus, 0xF8, data)
    assert ends == [status, status]


@pytest.mark.parametrize(("port", "size"), [(-1, 4), (0xFFFD, 4), (0xF4, 0), (0xF4, 9)])
def test_ports_that_cannot_be(port: int, size: int) -> None:
    with pytest.raises(ExitPortError, match="ports from"):
        DebugExit(print, port, size)


def test_firmware_config() -> None:
    bus = PortBus()
    bus.add(FirmwareConfig(3, 64 * MIB))
    assert read(bus, 0x511) == b"\0"
    for key, item in (
        (0, b"QEMU"),
        (1, b"\1\0\0\0"),
        (3, (64 * MIB).to_bytes(8, "little")),
        (5, b"\3\0"),
        (15, b"\3\0"),
        (0x4000, b""),
    ):
        write(bus, 0x510, key.to_bytes(2, "little"))
        assert read(bus, 0x511, count=len(item) + 2) == item + bytes(2)  # INS reads them at once
    write(bus, 0x510, b"\0\0")
    write(bus, 0x510, b"\5")  # no selector: too short
    write(bus, 0x511, b"\5\0")
    assert read(bus, 0x511) == b"Q"
    assert read(bus, 0x511, 2) == b"\xff\xff"
    assert read(bus, 0x510, 2) == b"\xff\xff"
