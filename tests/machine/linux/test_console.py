"""A guest's console on a terminal and on other input."""

import os
import pty
import termios
import threading
from collections.abc import Iterator

import pytest

from pykvm.devices.serial import Serial
from pykvm.kvm import Handlers
from pykvm.machine.linux.console import ESCAPE, Console
from tests.rigs.native_device import NativeDevice
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

DATA, IER, LSR = 0, 1, 5


@pytest.fixture
def serial() -> Iterator[Serial]:
    made = Serial()
    yield made
    made.close()


@pytest.fixture
def device(serial: Serial) -> NativeDevice:
    return NativeDevice(serial.attach(Handlers()))


def receive(device: NativeDevice, size: int) -> bytes:
    """Read bytes as a guest does."""
    found = bytearray()

    def arrived() -> bool:
        while device.read(LSR)[0] & 1:
            found.extend(device.read(DATA))
        return len(found) >= size

    wait_for(arrived)
    return bytes(found)


def test_a_terminal(serial: Serial, device: NativeDevice) -> None:
    """Every key is the guest's, but the escape; the terminal's settings come back."""
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    left = threading.Event()
    with Console(serial.feed, left.set, terminal):
        raw = termios.tcgetattr(terminal)
        assert not raw[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        os.write(keyboard, b"a\x03\x04")
        device.write(IER, 1)
        assert receive(device, 3) == b"a\x03\x04"
        assert not left.is_set()
        os.write(keyboard, ESCAPE)
        assert left.wait(30)
    assert termios.tcgetattr(terminal) == before
    os.close(keyboard)
    os.close(terminal)


def test_other_input(serial: Serial, device: NativeDevice) -> None:
    """All of it arrives, however slow the guest is; its end, and the escape in it, end nothing."""
    reader, writer = os.pipe()
    text = bytes(range(256)) * 40
    device.write(IER, 1)
    left = threading.Event()
    with Console(serial.feed, left.set, reader):
        with os.fdopen(writer, "wb") as file:
            file.write(text)
        assert receive(device, len(text)) == text
    assert not left.is_set()
    os.close(reader)


def test_a_guest_that_never_listens(serial: Serial) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * 5000)
    with Console(serial.feed, lambda: None, reader):
        pass
    os.close(reader)
    os.close(writer)
