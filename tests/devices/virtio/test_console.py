"""pykvm.devices.virtio.console: streams of bytes that begin, end, and lose nothing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio.console import Console, Port, PortNameError, PortState
from pykvm.devices.virtio.device import DeviceStateError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs import virtio_console
from tests.rigs.messages import one_line
from tests.rigs.virtio_console import MULTIPORT, SIZE, ConsoleDriver
from tests.rigs.virtio_driver import RING_FEATURES
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create(16 * MIB) as made:
        yield made


class Pipes:
    """A console of three ports: a terminal, a standard input, and an output."""

    def __init__(self, features: int) -> None:
        self.terminal_in, self.terminal_out = os.pipe(), os.pipe()
        self.input, self.output = os.pipe(), os.pipe()
        self.memory = GuestMemory.create(16 * MIB)
        self.console = Console(
            self.memory,
            [
                Port("", self.terminal_in[0], self.terminal_out[1]),
                Port("stdin", self.input[0]),
                Port("stdout", None, self.output[1]),
            ],
            (80, 25),
        )
        self.states: dict[int, PortState] = {}
        self.console.on_port = self.states.__setitem__
        self.driver = ConsoleDriver(self.console, features, self.memory)
        for ends in (self.terminal_in[0], self.terminal_out[1], self.input[0], self.output[1]):
            os.close(ends)  # the console has its own

    def close(self) -> None:
        self.console.close()
        self.driver.close()
        self.memory.close()
        for end in (self.terminal_in[1], self.terminal_out[0], self.input[1], self.output[0]):
            try:
                os.close(end)
            except OSError:
                continue  # the test has closed it


@pytest.fixture(params=RING_FEATURES, ids=hex)
def pipes(request: pytest.FixtureRequest) -> Iterator[Pipes]:
    made = Pipes(request.param | MULTIPORT | SIZE)
    yield made
    made.close()


@pytest.fixture
def plain() -> Iterator[Pipes]:
    made = Pipes(RING_FEATURES[-1] | MULTIPORT | SIZE)
    yield made
    made.close()


def _read(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := os.read(descriptor, size - len(data))):
        data += part
    return data


def test_ports_are_announced(pipes: Pipes) -> None:
    driver = pipes.driver
    driver.begin()
    names = {port: rest for port, _, _, rest in driver.wait_messages(virtio_console.NAME, 2)}
    assert names == {1: b"stdin", 2: b"stdout"}
    assert [port for port, *_ in driver.wait_messages(virtio_console.CONSOLE)] == [0]
    assert driver.wait_messages(virtio_console.RESIZE) == [
        (0, virtio_console.RESIZE, 1, struct.pack("<HH", 80, 25))
    ]
    assert pipes.console.config() == struct.pack("<HHII", 80, 25, 3, 0)


def test_both_directions(pipes: Pipes) -> None:
    driver = pipes.driver
    driver.begin()
    os.write(pipes.terminal_in[1], b"early")
    driver.control(0, virtio_console.OPEN, 1)
    assert driver.read(0, 5) == b"early"
    driver.write(0, b"hello ", b"world")
    assert _read(pipes.terminal_out[0], 11) == b"hello world"
    driver.write(0, b"")
    driver.write(0, b"!")
    assert _read(pipes.terminal_out[0], 1) == b"!"


def test_much_in_both_directions(pipes: Pipes) -> None:
    """More than pipes and queues hold, while either side is slow."""
    pick = random.Random(3)
    sent = pick.randbytes(700_000)
    driver = pipes.driver
    driver.begin()
    driver.control(1, virtio_console.OPEN, 1)
    driver.control(2, virtio_console.OPEN, 1)
    got: list[bytes] = []

    def feed() -> None:
        view = memoryview(sent)
        while view:
            view = view[os.write(pipes.input[1], view[: pick.randint(1, 30_000)]) :]
        os.close(pipes.input[1])

    def drain() -> None:
        while part := os.read(pipes.output[0], 5000):
            got.append(part)

    threads = [threading.Thread(target=feed), threading.Thread(target=drain)]
    for thread in threads:
        thread.start()
    assert driver.read(1, len(sent)) == sent
    at = 0
    while at < len(sent):
        size = pick.randint(1, 20_000)
        half = size // 2
        if driver.submit(driver.rx(2) + 1, [sent[at : at + half], sent[at + half : at + size]]):
            driver.kick(driver.rx(2) + 1)
            at += size
        else:
            driver.completed(driver.rx(2) + 1)
    driver.control(2, virtio_console.OPEN, 0)
    wait_for(lambda: pipes.states.get(2, PortState(0)) & PortState.CLOSED, 10)
    pipes.console.close()
    for thread in threads:
        thread.join(10)
    assert b"".join(got) == sent


def test_the_end_of_the_input(pipes: Pipes) -> None:
    """The guest is told after the last byte."""
    driver = pipes.driver
    driver.begin()
    os.write(pipes.input[1], b"x" * 10_000)
    os.close(pipes.input[1])
    driver.control(1, virtio_console.OPEN, 1)
    assert driver.wait_messages(virtio_console.OPEN, 4)[-1] == (1, virtio_console.OPEN, 0, b"")
    driver.poll()
    assert driver.received[1] == b"x" * 10_000
    wait_for(lambda: pipes.states.get(1, PortState(0)) & PortState.ENDED, 10)
    assert pipes.console.state(1) == PortState.OPENED | PortState.ENDED | PortState.NO_READER


def test_a_port_that_is_not_open_takes_nothing(plain: Pipes) -> None:
    """Linux throws away what comes for a port that nobody has opened."""
    driver = plain.driver
    driver.begin()
    os.write(plain.input[1], b"kept")
    driver.control(0, virtio_console.OPEN, 1)
    os.write(plain.terminal_in[1], b"now")
    assert driver.read(0, 3) == b"now"
    assert 1 not in driver.received
    driver.control(1, virtio_console.OPEN, 1)
    assert driver.read(1, 4) == b"kept"
    driver.control(1, virtio_console.OPEN, 0)
    wait_for(lambda: plain.console.state(1) & PortState.CLOSED, 10)
    os.write(plain.input[1], b"later")
    driver.poll()
    assert driver.received[1] == b""
    driver.control(1, virtio_console.OPEN, 1)
    assert driver.read(1, 5) == b"later"


def test_a_reader_that_does_not_read(pipes: Pipes) -> None:
    """The guest waits; when it stops, the rest is kept, and the next start or a flush writes it."""
    driver, console = pipes.driver, pipes.console
    driver.begin()
    driver.control(2, virtio_console.OPEN, 1)
    text = b"".join(b"%07d\n" % n for n in range(5 * 4096))
    tx = driver.rx(2) + 1
    for at in range(0, len(text), 16384):
        assert driver.submit(tx, [text[at : at + 4096], text[at + 4096 : at + 16384]])
    driver.kick(tx)
    wait_for(lambda: driver.completed(tx, 0, 0), 10)  # those that a pipe holds
    assert driver.pending
    driver.control(2, virtio_console.OPEN, 0)
    assert not console.state(2) & PortState.CLOSED, "not all is out"
    assert console.flush(0) == 0, "it runs"
    driver.stop(console)
    driver.completed(tx, 0, 0)
    left = console.flush(0)
    assert 0 < left < len(text)
    got = _read(pipes.output[0], 20_000)
    assert 0 < console.flush(0) < left
    driver.start(console)
    got += _read(pipes.output[0], 50_000)
    driver.write(2, b"more")
    got += _read(pipes.output[0], len(text) + 4 - len(got))
    assert got == text + b"more"
    driver.stop(console)
    assert console.flush(5) == 0


def test_a_reader_that_has_gone(pipes: Pipes) -> None:
    """The guest does not wait for it, and the caller is told."""
    driver = pipes.driver
    driver.begin()
    os.close(pipes.output[0])
    driver.control(2, virtio_console.OPEN, 1)
    for _ in range(50):
        driver.request(driver.rx(2) + 1, [b"x" * 5000])
    wait_for(lambda: pipes.states.get(2, PortState(0)) & PortState.NO_READER, 10)
    os.write(pipes.terminal_in[1], b"on")
    driver.control(0, virtio_console.OPEN, 1)
    assert driver.read(0, 2) == b"on"


def test_a_new_size(plain: Pipes) -> None:
    changed: list[bytes] = []
    plain.console.on_config = lambda: changed.append(plain.console.config())
    driver = plain.driver
    driver.begin()
    driver.control(0, virtio_console.OPEN, 1)
    plain.console.resize(132, 43)
    assert driver.wait_messages(virtio_console.RESIZE, 2)[-1][3] == struct.pack("<HH", 132, 43)
    assert changed == [struct.pack("<HHII", 132, 43, 3, 0)]


def test_without_ports() -> None:
    """A driver that knows no ports has the first, which is always open."""
    pipes = Pipes(0)
    pipes.driver.begin()
    pipes.driver.write(0, b"out")
    assert _read(pipes.terminal_out[0], 3) == b"out"
    os.write(pipes.terminal_in[1], b"in")
    assert pipes.driver.read(0, 2) == b"in"
    assert not pipes.driver.messages
    pipes.close()


def test_a_driver_that_begins_again(plain: Pipes) -> None:
    """What the last one had open is not open to the next one."""
    driver = plain.driver
    driver.begin()
    driver.control(1, virtio_console.OPEN, 1)
    assert plain.console.state(1) & PortState.OPENED
    plain.console.stop()
    driver.reset()
    driver.messages = []
    os.write(plain.input[1], b"for the second")
    driver.begin()
    assert not plain.console.state(1) & PortState.OPENED
    driver.control(1, virtio_console.OPEN, 1)
    assert driver.read(1, 14) == b"for the second"


def test_a_stop_between_changes_nothing(plain: Pipes) -> None:
    """As for a snapshot: with the rings' bases and states, another console goes on."""
    driver = plain.driver
    driver.begin()
    driver.control(1, virtio_console.OPEN, 1)
    driver.stop(plain.console)
    state = plain.console.state(1)
    plain.console.set_state(1, PortState(0))
    assert not plain.console.state(1) & PortState.OPENED
    plain.console.set_state(1, state)
    os.write(plain.input[1], b"on")
    driver.start(plain.console)
    assert driver.read(1, 2) == b"on"


def test_another_console_goes_on(plain: Pipes) -> None:
    """As after a snapshot."""
    driver = plain.driver
    driver.begin()
    driver.control(1, virtio_console.OPEN, 1)
    driver.stop(plain.console)
    state = json.loads(json.dumps(plain.console.save()))
    plain.console.close()
    reader, writer = os.pipe()
    ports = [Port(), Port("stream", reader), *(Port() for _ in plain.console.ports[2:])]
    other = Console(driver.memory, ports, (80, 25))
    changes: list[object] = [None, [], {}, {"ports": state["ports"][1:]}]
    changes += [{"ports": [wrong, *state["ports"][1:]]} for wrong in (-1, 16, "1", True, None)]
    for wrong in changes:
        with pytest.raises(DeviceStateError) as caught:
            other.restore(wrong)
        one_line(caught.value)
    other.restore(state)
    driver.start(other)
    os.write(writer, b"for another")
    assert driver.read(1, 11) == b"for another"
    other.close()
    for end in (reader, writer):
        os.close(end)


def test_a_terminal(memory: GuestMemory) -> None:
    """Its modes are the user's: O_NONBLOCK is not set where the shell would see it."""
    master, terminal = pty.openpty()
    console = Console(memory, [Port("", terminal, terminal)])
    driver = ConsoleDriver(console, 0, memory)
    driver.begin()
    os.write(master, b"typed\n")
    assert driver.read(0, 6) == b"typed\n"
    driver.write(0, b"shown")
    assert b"shown" in _read(master, 12)
    assert not fcntl.fcntl(terminal, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(terminal)
    os.close(master)  # hangs up
    wait_for(lambda: console.state(0) & PortState.ENDED, 10)
    console.close()
    driver.close()


def test_files(memory: GuestMemory, tmp_path: Path) -> None:
    """A file's position is shared with whoever has opened it, so it is not opened again."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"skipped" + b"y" * 50_000)
    with source.open("rb", 0) as file, target.open("wb", 0) as out:
        file.read(7)
        out.write(b"before ")
        console = Console(memory, [Port("", file.fileno(), out.fileno())])
        driver = ConsoleDriver(console, MULTIPORT, memory)
        driver.begin()
        driver.control(0, virtio_console.OPEN, 1)
        assert driver.read(0, 50_000) == b"y" * 50_000
        assert driver.wait_messages(virtio_console.OPEN, 2)[-1][2] == 0
        driver.request(1, [b"after"])
        console.close()
        driver.close()
    assert target.read_bytes() == b"before after"


def test_a_hostile_driver(plain: Pipes) -> None:
    """Messages of any length for any port, buffers without room, and chains the wrong way round."""
    driver = plain.driver
    driver.begin()
    pick = random.Random(5)
    for _ in range(300):
        message = struct.pack("<IHH", pick.choice([0, 1, 2, 3, 2**32 - 1]), pick.randrange(9), 1)
        driver.request(3, [message[: pick.randint(0, 8)] + b"x" * pick.choice([0, 0, 100])])
        driver.poll()
    driver.request(3, [], [64])
    driver.request(driver.rx(2) + 1, [], [64])
    driver.submit(driver.rx(1), [b"no room"])
    driver.kick(driver.rx(1), always=True)
    driver.control(0, virtio_console.READY, 1)
    for port in range(3):
        driver.control(port, virtio_console.PORT_READY, 1)
        driver.control(port, virtio_console.OPEN, 1)
    os.write(plain.input[1], b"still here")
    assert driver.read(1, 10) == b"still here"


def test_names_and_numbers_of_ports(memory: GuestMemory) -> None:
    for ports in ([], [Port()] * 32, [Port("x" * 32)], [Port("a\0b")]):
        with pytest.raises(PortNameError):
            Console(memory, ports)
    console = Console(memory, [Port("x" * 31)] * 31)
    assert len(console.queue_sizes) == 64
    assert console.state(30) == PortState.NO_READER
    console.close()
    console.close()
    assert console.state(30) == PortState(0)
    console.resize(1, 1)


def test_a_driver_that_says_hello_again(plain: Pipes) -> None:
    """What is half out of a buffer is not written twice (found by fuzzing)."""
    driver = plain.driver
    driver.begin()
    driver.control(2, virtio_console.OPEN, 1)
    text = b"".join(b"%07d\n" % n for n in range(20_000))
    tx = driver.rx(2) + 1
    assert driver.submit(tx, [text])
    driver.kick(tx)
    got = _read(plain.output[0], 20_000)
    driver.control(0, virtio_console.READY, 1)
    got += _read(plain.output[0], len(text) - len(got))
    driver.write(2, b"end")
    assert got + _read(plain.output[0], 3) == text + b"end"
