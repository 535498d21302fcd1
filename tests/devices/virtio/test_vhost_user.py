"""pykvm.devices.virtio.vhost_user: what a back end is told, and back ends that misbehave."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.virtio.device import NO_CALL, DeviceType, Feature, Ring
from pykvm.devices.virtio.ring_memory import RingError
from pykvm.devices.virtio.vhost_user import VhostUserDevice
from pykvm.devices.virtio.vhost_user_connection import (
    BackendError,
    BackendFailedError,
    BackendGoneError,
    BackendHungError,
    BackendRefusedError,
    VhostUserConnection,
)
from pykvm.devices.virtio.vhost_user_messages import MalformedMessageError
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region, RegionError
from pykvm.sizes import GIB, MIB
from tests.rigs.vhost_user_backend import CONFIG, PROTOCOL_FEATURES, VERSION_1, VhostUserBackend

pytestmark = pytest.mark.unit

SLOTS = 1 << 15
RESET = 1 << 13


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Low and high memory of a guest, and two regions that are nobody else's."""
    with GuestMemory() as made:
        with MemoryFile("ram", 4 * MIB) as file:
            made.add(Region(file, 0, size=MIB, shareable=True))
            made.add(Region(file, 4 * GIB, offset=MIB, size=2 * MIB, shareable=True))
            made.add(Region(file, 8 * GIB, offset=3 * MIB, shareable=True, read_only=True))
        with MemoryFile("window", MIB) as file:
            made.add(Region(file, 16 * GIB))
        yield made


@pytest.fixture
def backend() -> Iterator[VhostUserBackend]:
    with VhostUserBackend() as made:
        yield made


def device_of(
    backend: VhostUserBackend, memory: GuestMemory, queues: int = 2, config_size: int = 60
) -> VhostUserDevice:
    return VhostUserDevice(
        DeviceType.BLOCK,
        backend.connection,
        memory,
        queue_sizes=[64] * queues,
        config_size=config_size,
    )


def ring(index: int = 0, *, base: int = 0, at: int = 0x1000, call: bool = True) -> Ring:
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    called = os.eventfd(0, os.EFD_NONBLOCK) if call else NO_CALL
    return Ring(index, 64, at, at + 0x400, at + 0x500, base, kick, called)


def give_back(*rings: Ring) -> None:
    for one in rings:
        os.close(one.kick)
        if one.call != NO_CALL:
            os.close(one.call)


def failures(device: VhostUserDevice) -> Callable[[], list[str]]:
    """Return what waits for a failure of `device` and returns all of them."""
    seen: list[str] = []
    happened = threading.Event()

    def note(reason: str) -> None:
        seen.append(reason)
        happened.set()

    device.on_failure = note

    def wait() -> list[str]:
        assert happened.wait(5)
        return seen

    return wait


def test_a_session(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        assert device.features == 1 << 28 | 1 << 29 | 0b1011
        assert device.config() == CONFIG
        assert backend.requests == [3, 1, 15, 16, 17, 21, 24]
        first, second = ring(0, base=5), ring(1, at=4 * GIB, call=False)
        memory.write(4 * GIB + 0x123, b"from the guest")
        device.start(device.features, [first, second])
        log = backend.log[7:]
        assert [code for code, _, _ in log] == [2, 5] + [8, 10, 9, 14, 13, 12, 18] * 2
        assert log[0][1] == struct.pack("=Q", device.features | VERSION_1 | PROTOCOL_FEATURES)
        addresses = struct.pack("=IIQQQQ", 0, 0, 0x1000, 0x1500, 0x1400, 0)
        assert next(one for one in log if one[0] == 9) == (9, addresses, 0)
        assert all(descriptors == 1 for code, _, descriptors in log if code in (12, 13, 14))
        # What the back end maps is the guest's memory, and no more of it than RAM.
        assert backend.read(4 * GIB + 0x123, 14) == b"from the guest"
        assert [(gpa, size) for gpa, size, _, _ in backend.memory] == [
            (0, MIB),
            (4 * GIB, 2 * MIB),
        ]
        assert os.eventfd_read(first.kick) == 1
        os.eventfd_write(backend.fds[13, 0][0], 1)
        assert os.eventfd_read(first.call) == 1
        os.eventfd_write(backend.fds[13, 1][0], 1)  # of a driver that polls
        assert device.stop() == {0: 12, 1: 7}
        assert device.stop() == {}
        device.start(device.features, [first])
        assert device.stop() == {0: 12}
        give_back(first, second)


def test_a_back_end_without_protocol_features(memory: GuestMemory) -> None:
    with VhostUserBackend(features=VERSION_1 | 0b11 | 1 << 27) as backend:
        device = device_of(backend, memory, config_size=0)
        assert device.features == 0b11
        assert device.config() == b""
        one = ring()
        device.start(0b1, [one])
        assert backend.requests == [3, 1, 2, 5, 8, 10, 9, 14, 13, 12, 1]
        assert backend.log[2][1] == struct.pack("=Q", VERSION_1 | 0b1)
        assert device.stop() == {0: 7}
        device.close()
        device.close()
        give_back(one)


def test_memory_region_by_region(memory: GuestMemory) -> None:
    with (
        VhostUserBackend(protocol=1 << 3 | SLOTS) as backend,
        device_of(backend, memory, config_size=0) as device,
    ):
        one = ring()
        device.start(0, [one])
        assert backend.requests.count(37) == 2
        memory.write(0x2000, b"low")
        assert backend.read(0x2000, 3) == b"low"
        device.stop()
        memory.remove(memory.region_at(4 * GIB))
        device.start(0, [one])
        assert [backend.requests.count(code) for code in (5, 37, 38)] == [0, 2, 1]
        assert [gpa for gpa, _, _, _ in backend.memory] == [0]
        device.stop()
        backend.slots = 1
        give_back(one)


def test_too_many_regions_for_a_back_end(memory: GuestMemory) -> None:
    with VhostUserBackend() as backend, device_of(backend, memory) as device:
        with MemoryFile("more", 7 * MIB) as file:
            for n in range(7):
                memory.add(Region(file, (20 + n) * GIB, offset=n * MIB, size=MIB, shareable=True))
        one = ring()
        with pytest.raises(BackendRefusedError, match=r"takes 8 regions of memory.* has 9"):
            device.start(0, [one])
        give_back(one)


def test_a_reset_is_told_where_the_driver_begins_anew(memory: GuestMemory) -> None:
    with (
        VhostUserBackend(protocol=1 << 3 | RESET) as backend,
        device_of(backend, memory, config_size=0) as device,
    ):
        one, later = ring(), ring(base=9)
        device.start(0, [one])
        device.stop()
        device.start(0, [later])  # goes on
        device.stop()
        assert 34 not in backend.requests
        device.start(0, [one])
        device.stop()
        assert backend.requests.count(34) == 1
        give_back(one, later)


def test_configuration(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        changed = threading.Event()
        device.on_config = changed.set
        device.write_config(32, b"\x01")
        assert device.config() == CONFIG[:32] + b"\x01" + CONFIG[33:]
        for offset, data in ((60, b"x"), (59, b"xy"), (0, b""), (1 << 40, b"x"), (-1, b"x")):
            device.write_config(offset, data)
        assert backend.requests.count(25) == 1
        backend.status[25] = 1  # read-only
        device.write_config(0, b"x")
        backend.config = bytes(60)
        with backend.channel() as channel:
            channel.settimeout(5)
            channel.sendall(struct.pack("=III", 2, 1, 0))
            assert changed.wait(5)
            assert device.config() == bytes(60)
            changed.clear()
            channel.sendall(struct.pack("=III", 2, 9, 0))
            assert channel.recv(100) == struct.pack("=IIIQ", 2, 5, 8, 0)
            assert changed.wait(5)
            channel.sendall(struct.pack("=III", 3, 9, 24) + bytes(24))
            assert channel.recv(100) == struct.pack("=IIIQ", 3, 5, 8, 1)  # not supported


@pytest.mark.parametrize(
    "said",
    [b"\0" * 12, struct.pack("=III", 2, 1, 1 << 31), struct.pack("=III", 2, 5, 0), b"\xff" * 40],
)
def test_rubbish_on_the_channel(
    backend: VhostUserBackend, memory: GuestMemory, said: bytes
) -> None:
    with device_of(backend, memory) as device, backend.channel() as channel:
        failed = failures(device)
        channel.sendall(said)
        assert len(failed()) == 1
        assert failed()[0].startswith("the test's back end: a ")


def test_half_a_message_on_the_channel_does_not_hold_the_device_up(
    backend: VhostUserBackend, memory: GuestMemory
) -> None:
    with device_of(backend, memory) as device, backend.channel() as channel:
        channel.sendall(b"\x02\0\0")
        time.sleep(0.05)
        assert device.config() == CONFIG
        began = time.monotonic()
    assert time.monotonic() - began < 2


def test_a_back_end_that_hangs_up(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        failed = failures(device)
        one = ring()
        device.start(0, [one])
        backend.hang_up()
        assert failed() == ["the test's back end has closed its connection"]
        assert device.stop() == {}
        assert device.config() == CONFIG  # the last one
        device.write_config(0, b"x")
        with pytest.raises(BackendFailedError, match="has closed its connection"):
            device.start(0, [one])
        assert len(failed()) == 1
        give_back(one)


def test_an_error_of_a_ring(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        failed = failures(device)
        one = ring()
        device.start(0, [one])
        os.eventfd_write(backend.fds[14, 0][0], 1)
        assert failed() == ["the test's back end has met an error in a virtqueue"]
        give_back(one)


def test_a_back_end_that_hangs(memory: GuestMemory) -> None:
    with VhostUserBackend(timeout=0.2) as backend, device_of(backend, memory) as device:
        failed = failures(device)
        one = ring()
        device.start(0, [one])
        backend.answers[11] = None
        began = time.monotonic()
        assert device.stop() == {}
        assert 0.1 < time.monotonic() - began < 3
        assert failed() == [
            "the test's back end has not answered GET_VRING_BASE in 0.2 seconds: "
            "see whether it still runs"
        ]
        give_back(one)


def test_a_back_end_that_trickles(memory: GuestMemory) -> None:
    """A byte now and then does not prolong the time for a reply."""
    with VhostUserBackend(timeout=0.3) as backend:
        whole = struct.pack("=IIIQ", 1, 5, 8, VERSION_1)

        def trickle() -> None:
            for byte in whole:
                backend._socket.sendall(bytes([byte]))
                time.sleep(0.1)

        backend.answers[1] = trickle
        began = time.monotonic()
        with pytest.raises(BackendHungError, match="GET_FEATURES"):
            device_of(backend, memory)
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("code", [1, 15, 17, 24])
@pytest.mark.parametrize(
    "reply",
    [
        b"\0" * 100,
        b"\xff" * 100,
        struct.pack("=IIIQ", 99, 5, 8, 0),  # of another request
        struct.pack("=III", 0, 5, 0xFFFF_FFFF),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_rubbish_for_a_reply(
    backend: VhostUserBackend, memory: GuestMemory, code: int, reply: bytes
) -> None:
    backend.answers[code] = reply
    with pytest.raises(PykvmError, match="the test's back end") as caught:
        device_of(backend, memory)
    assert isinstance(caught.value, MalformedMessageError | BackendFailedError)
    assert "\n" not in str(caught.value)
    assert backend.connection.fileno() == -1  # nothing is left open


@pytest.mark.parametrize("code", [1, 15, 17, 24])
def test_a_short_reply(backend: VhostUserBackend, memory: GuestMemory, code: int) -> None:
    backend.answers[code] = lambda: _half(backend, code)
    with pytest.raises(BackendError, match=r"the test's back end .*has closed the connection"):
        device_of(backend, memory)


def _half(backend: VhostUserBackend, code: int) -> None:
    backend._socket.sendall(struct.pack("=IIII", code, 5, 8, 1))
    backend._socket.shutdown(socket.SHUT_RDWR)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 15, 17, 24, 11, 2, 12]), st.binary(max_size=80))
def test_any_bytes_for_a_reply(code: int, data: bytes) -> None:
    """Whatever a back end says, the device goes on, or there is one error of ours."""
    with (
        GuestMemory.create(MIB, shareable=True) as memory,
        VhostUserBackend(timeout=0.05) as backend,
    ):
        backend.answers[code] = data
        one, said = ring(), ""
        try:
            with device_of(backend, memory, queues=1) as device:
                device.start(device.features, [one])
                for base in device.stop().values():
                    assert 0 <= base < 1 << 32
                assert len(device.config()) == 60
        except PykvmError as error:
            said = str(error)
        finally:
            give_back(one)
        assert "\n" not in said


def test_descriptors_of_a_back_end_are_not_kept(
    backend: VhostUserBackend, memory: GuestMemory
) -> None:
    def answer() -> None:
        data = struct.pack("=IIIQ", 1, 5, 8, VERSION_1 | PROTOCOL_FEATURES)
        socket.send_fds(backend._socket, [data], [0] * 50)

    backend.answers[1] = answer
    before = len(os.listdir("/proc/self/fd"))
    with device_of(backend, memory) as device:
        assert device.config() == CONFIG
        # The watch's two eventfds, ours for rings without a call, the two ends of the channel,
        # and the back end's copy of one of them.
        assert len(os.listdir("/proc/self/fd")) <= before + 6
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_refused_request(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        backend.status[9] = 22
        one, two = ring(0), ring(1)
        with pytest.raises(BackendRefusedError, match="refuses SET_VRING_ADDR with 0x16"):
            device.start(0, [one, two])
        del backend.status[9]
        device.start(0, [one, two])
        assert device.stop() == {0: 7, 1: 7}
        give_back(one, two)


@pytest.mark.parametrize(
    ("made", "lacking"),
    [
        ({"features": PROTOCOL_FEATURES}, "virtio 1.0"),
        ({"protocol": 1}, "a configuration"),
        ({"features": VERSION_1}, "a configuration"),
        ({"queues": 1}, r"2 queues \(it has 1\)"),
    ],
)
def test_a_back_end_that_lacks_something(
    memory: GuestMemory, made: dict[str, int], lacking: str
) -> None:
    with (
        VhostUserBackend(**made) as backend,
        pytest.raises(BackendRefusedError, match=f"does without {lacking}"),
    ):
        device_of(backend, memory)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Ring(0, 64, 0x1008, 0x2000, 0x3000, 0, -1, -1), "descriptor table .* not aligned"),
        (Ring(0, 64, 0x1000, 0x2001, 0x3000, 0, -1, -1), "available ring .* not aligned"),
        (Ring(0, 64, 0x1000, 0x2000, 0x3002, 0, -1, -1), "used ring .* not aligned"),
        (Ring(0, 64, MIB - 16, 0x2000, 0x3000, 0, -1, -1), "descriptor table .* outside"),
        (Ring(0, 64, 0x1000, 2**64 - 2, 0x3000, 0, -1, -1), "available ring .* outside"),
        (Ring(0, 64, 0x1000, 0x2000, 8 * GIB, 0, -1, -1), "used ring .* outside"),  # read-only
        (Ring(0, 64, 0x1000, 16 * GIB, 0x3000, 0, -1, -1), "available ring .* outside"),  # window
        (Ring(0, 0, 0x1000, 0x2000, 0x3000, 0, -1, -1), "of 0 descriptors"),
        (Ring(0, 128, 0x1000, 0x2000, 0x3000, 0, -1, -1), "takes 1 to 64"),
        (Ring(0, 63, 0x1000, 0x2000, 0x3000, 0, -1, -1), "power of 2"),
        (Ring(2, 64, 0x1000, 0x2000, 0x3000, 0, -1, -1), "no virtqueue 2"),
    ],
)
def test_a_ring_that_cannot_be(
    backend: VhostUserBackend, memory: GuestMemory, bad: Ring, reason: str
) -> None:
    with device_of(backend, memory) as device:
        before = len(backend.log)
        with pytest.raises(RingError, match=reason):
            device.start(0, [bad])
        assert len(backend.log) == before  # the back end has heard nothing of it


def test_a_ring_twice(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        bad = Ring(0, 64, 0x1000, 0x2000, 0x3000, 0, -1, -1)
        with pytest.raises(RingError, match="twice"):
            device.start(0, [bad, bad])


def test_packed_rings_may_have_any_size(memory: GuestMemory) -> None:
    features = VERSION_1 | PROTOCOL_FEATURES | Feature.RING_PACKED
    with VhostUserBackend(features=features) as backend, device_of(backend, memory) as device:
        kick = os.eventfd(0)
        packed = Ring(0, 63, 0x1000, 0x2000, 0x3000, 0x8000_8000, kick, -1)
        device.start(device.features, [packed])
        assert device.stop() == {0: 0x8000_8007}
        os.close(kick)


def test_memory_that_cannot_be_shared(backend: VhostUserBackend) -> None:
    with (
        GuestMemory.create(MIB) as memory,
        device_of(backend, memory) as device,
        pytest.raises(RegionError, match="make its regions with shareable=True"),
    ):
        device.start(0, [])


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(BackendGoneError, match="no such file or directory"):
        VhostUserConnection.connect(tmp_path / "none")
    with pytest.raises(BackendGoneError, match="too long"):
        VhostUserConnection.connect(tmp_path / ("n" * 200))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "deaf"))
        with pytest.raises(BackendGoneError, match="connection refused"):
            VhostUserConnection.connect(tmp_path / "deaf")
