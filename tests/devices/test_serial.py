"""pykvm.devices.serial: registers, interrupts, input and output of a 16550A."""

import json
import os
import socket
from collections.abc import Iterator

import pytest

from pykvm.devices.serial import COM1_PORT, Serial, SerialStateError
from pykvm.kvm import Handlers, Hlt, Kvm
from tests.rigs.messages import one_line
from tests.rigs.native_device import NativeDevice
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.unit

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
FCR = IIR
RECEIVED, SENT = 0x04, 0x02
NOTHING = 0x01
READY, EMPTY, OVERRUN = 0x01, 0x60, 0x02


@pytest.fixture
def output() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def serial(output: tuple[int, int]) -> Iterator[Serial]:
    made = Serial(output[1])
    yield made
    made.close()


@pytest.fixture
def device(serial: Serial) -> NativeDevice:
    return NativeDevice(serial.attach(Handlers()))


def pulses(serial: Serial) -> int:
    """Number of pulses on the interrupt line since the last call."""
    try:
        return os.eventfd_read(serial.interrupt)
    except BlockingIOError:
        return 0


def test_output_is_written_at_once(device: NativeDevice, output: tuple[int, int]) -> None:
    for byte in b"hello":
        assert device.write(DATA, byte)
    assert os.read(output[0], 100) == b"hello"
    assert device.write(DATA, b"line\n", count=5)
    assert os.read(output[0], 100) == b"line\n"
    assert device.read(LSR) == bytes([EMPTY])


def test_the_tail_is_kept(device: NativeDevice, serial: Serial, output: tuple[int, int]) -> None:
    text = b"".join(b"%06d\n" % n for n in range(12_000))
    for start in range(0, len(text), 7000):
        part = text[start : start + 7000]
        device.write(DATA, part, count=len(part))
        while len(part) > 0:
            part = part[len(os.read(output[0], 1 << 16)) :]
    assert serial.tail() == text[-65536:]
    assert serial.tail(7) == b"011999\n"


def test_nobody_reads(serial: Serial, device: NativeDevice, output: tuple[int, int]) -> None:
    """A reader that has gone ends nothing; a port without output keeps the tail."""
    reader, writer = os.pipe()
    other = Serial(writer)
    port = NativeDevice(other.attach(Handlers()))
    os.close(reader)
    assert port.write(DATA, b"lost", count=4)
    assert port.write(DATA, b"too", count=3)
    assert other.tail() == b"losttoo"
    other.close()
    os.close(writer)


def test_input(device: NativeDevice, serial: Serial) -> None:
    assert device.read(DATA) == b"\0"
    assert serial.feed(b"ab") == 0  # nobody listens
    device.write(IER, 0x01)
    assert pulses(serial) == 0
    assert serial.feed(b"ab") == 2
    assert pulses(serial) == 1
    assert device.read(LSR) == bytes([EMPTY | READY])
    assert device.read(IIR) == bytes([RECEIVED])
    assert device.read(DATA) + device.read(DATA) == b"ab"
    assert device.read(IIR) == bytes([NOTHING])
    assert device.read(LSR) == bytes([EMPTY])


def test_too_much_input(device: NativeDevice, serial: Serial) -> None:
    device.write(IER, 0x01)
    assert serial.feed(b"x" * 5000) == 4096
    assert serial.feed(b"y") == 0
    assert device.read(LSR) == bytes([EMPTY | READY])  # nothing was lost: the sender keeps it
    assert b"".join(device.read(DATA) for _ in range(4097)) == b"x" * 4096 + b"\0"
    assert serial.feed(b"y") == 1
    device.write(FCR, 0x03)  # clear the receiver's FIFO
    assert device.read(LSR) == bytes([EMPTY])


def test_the_interrupt_of_an_empty_register(device: NativeDevice, serial: Serial) -> None:
    device.write(IER, 0x02)
    assert pulses(serial) == 1
    assert device.read(IIR) == bytes([SENT])
    assert device.read(IIR) == bytes([NOTHING])  # reading it ends it
    device.write(DATA, b"z")
    assert pulses(serial) == 1
    assert device.read(IIR) == bytes([SENT])
    device.write(IER, 0)
    device.write(DATA, b"z")
    assert pulses(serial) == 0


def test_the_divisor(device: NativeDevice, output: tuple[int, int]) -> None:
    device.write(LCR, 0x83)
    device.write(DATA, 0x0C)
    device.write(IER, 0x34)
    assert (device.read(DATA), device.read(IER)) == (b"\x0c", b"\x34")
    device.write(LCR, 0x03)
    assert device.read(LCR) == b"\x03"
    assert device.read(IER) == b"\0"
    with pytest.raises(BlockingIOError):
        os.read(output[0], 1)


@pytest.mark.parametrize(("out", "into"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_the_loop(device: NativeDevice, output: tuple[int, int], out: int, into: int) -> None:
    """What Linux looks for a 16550A with: the port connected to itself."""
    assert device.read(MSR) == b"\xb0"
    device.write(MCR, 0x10 | out)
    assert device.read(MSR) == bytes([into])
    device.write(DATA, b"q")
    assert device.read(DATA) == b"q"
    for byte in b"r" * 4097:
        device.write(DATA, byte)
    assert device.read(LSR) == bytes([EMPTY | READY | OVERRUN])
    assert device.read(LSR) == bytes([EMPTY | READY])
    with pytest.raises(BlockingIOError):
        os.read(output[0], 1)


def test_a_guest_writes_anything(device: NativeDevice, serial: Serial) -> None:
    """Accesses of every size at every port, with every value."""
    for offset in range(8):
        for size in (1, 2, 4, 8):
            for value in (0, 0x55, 0xFF):
                device.write(offset, bytes([value]) * size)
                assert len(device.read(offset, size)) == size
        device.write(offset, b"\xff" * 8, count=2)
        device.read(offset, 4, count=3)
    device.write(SCRATCH, 0x5A)
    assert device.read(SCRATCH) == b"\x5a"
    assert serial.feed(b"still there") >= 0


def test_saved_and_restored(device: NativeDevice, serial: Serial) -> None:
    device.write(LCR, 0x83)
    device.write(DATA, 0x0C)
    device.write(IER, 0x34)
    device.write(LCR, 0x03)
    device.write(FCR, 0x01)
    device.write(MCR, 0x0B)
    device.write(SCRATCH, 0x77)
    device.write(IER, RECEIVED | 0x01)
    # Input that wraps around in the buffer.
    assert serial.feed(b"x" * 4000) == 4000
    for _ in range(3999):
        device.read(DATA)
    assert serial.feed(b"ab" * 100) == 200
    state = json.loads(json.dumps(serial.save()))
    assert bytes.fromhex(state["input"]) == b"x" + b"ab" * 100
    again = Serial()
    other = NativeDevice(again.attach(Handlers()))
    again.restore(state)
    assert pulses(again) == 1
    assert again.save() == state == serial.save()
    assert other.read(IIR) == bytes([0xC0 | RECEIVED])
    assert [other.read(at) for at in (LCR, MCR, SCRATCH)] == [b"\x03", b"\x0b", b"\x77"]
    assert b"".join(other.read(DATA) for _ in range(201)) == b"x" + b"ab" * 100
    other.write(LCR, 0x83)
    assert (other.read(DATA), other.read(IER)) == (b"\x0c", b"\x34")
    again.close()


def test_a_quiet_port_raises_nothing_when_restored(serial: Serial) -> None:
    serial.restore(Serial().save())
    assert pulses(serial) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"ier": 0x10},
        {"mcr": 256},
        {"mcr": 0x20},
        {"lcr": -1},
        {"sent": 2},
        {"overrun": 1},
        {"divisor": 1 << 16},
        {"divisor": None},
        {"scr": "1"},
        {"scr": 1.5},
        {"input": "0"},
        {"input": "zz"},
        {"input": 7},
        {"input": "00" * 4097},
        {"more": 1},
    ],
)
def test_states_of_no_port(serial: Serial, change: dict[str, object]) -> None:
    before = serial.save()
    with pytest.raises(SerialStateError) as caught:
        serial.restore({**before, **change})
    one_line(caught.value)
    with pytest.raises(SerialStateError):
        serial.restore(
            {name: value for name, value in before.items() if name not in change}
            if change != {"more": 1}
            else {}
        )
    assert serial.save() == before


@pytest.mark.kvm
def test_in_a_guest(output: tuple[int, int]) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        guest = RealModeGuest(vm)
        serial = Serial(output[1])
        serial.attach(vm.handlers, COM1_PORT)
        guest.memory[0x6000:0x6006] = b"hello "
        guest.load("""
            BE 00 60     ; mov si, 0x6000
            B9 06 00     ; mov cx, 6
            BA F8 03     ; mov dx, 0x3F8
            F3 6E        ; rep outsb
            F4           ; hlt
        """)
        assert run(guest.vcpu) == Hlt()
        assert os.read(output[0], 100) == b"hello "
        serial.close()


def test_watchers_see_what_is_written() -> None:
    """They make nobody wait: what has no room is not for them."""
    pairs = [socket.socketpair() for _ in range(5)]
    with_no_output = Serial()
    device = NativeDevice(with_no_output.attach(Handlers()))
    try:
        added = [with_no_output.watch(ours.fileno()) for ours, _ in pairs]
        assert added == [True] * 4 + [False]
        device.write(0, b"hello", count=5)
        assert all(theirs.recv(100) == b"hello" for _, theirs in pairs[:4])
        with_no_output.unwatch(pairs[0][0].fileno())
        with_no_output.unwatch(pairs[0][0].fileno())
        assert with_no_output.watch(pairs[4][0].fileno())
        pairs[1][1].close()
        device.write(0, b"x" * 1000, count=1000)
        assert pairs[4][1].recv(2000) == b"x" * 1000
        for _ in range(1000):
            device.write(0, b"y" * 1000, count=1000)  # full, and gone: neither stops the guest
        assert with_no_output.tail(3) == b"yyy"
    finally:
        with_no_output.close()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()
