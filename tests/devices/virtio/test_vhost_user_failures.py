"""pykvm.devices.virtio.vhost_user: back ends that misbehave."""

import os
import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.virtio.vhost_user_connection import (
    BackendError,
    BackendFailedError,
    BackendHungError,
    BackendRefusedError,
)
from pykvm.devices.virtio.vhost_user_messages import MalformedMessageError
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.device_failures import failures_of
from tests.rigs.vhost_user_backend import (
    CONFIG,
    PROTOCOL_FEATURES,
    VERSION_1,
    VhostUserBackend,
    device_of,
    give_back,
    ring,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "said",
    [b"\0" * 12, struct.pack("=III", 2, 1, 1 << 31), struct.pack("=III", 2, 5, 0), b"\xff" * 40],
)
def test_rubbish_on_the_channel(
    backend: VhostUserBackend, memory: GuestMemory, said: bytes
) -> None:
    with device_of(backend, memory) as device, backend.channel() as channel:
        failed = failures_of(device)
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
        failed = failures_of(device)
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
        failed = failures_of(device)
        one = ring()
        device.start(0, [one])
        os.eventfd_write(backend.fds[14, 0][0], 1)
        assert failed() == ["the test's back end has met an error in a virtqueue"]
        give_back(one)


def test_a_back_end_that_hangs(memory: GuestMemory) -> None:
    with VhostUserBackend(timeout=0.2) as backend, device_of(backend, memory) as device:
        failed = failures_of(device)
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


def test_a_close_does_not_wait_for_a_back_end_that_hangs(
    backend: VhostUserBackend, memory: GuestMemory
) -> None:
    device, one = device_of(backend, memory), ring()
    device.start(0, [one])
    asked = threading.Event()
    backend.answers[11] = asked.set
    stopping = threading.Thread(target=device.stop)
    stopping.start()
    assert asked.wait(5)
    began = time.monotonic()
    device.close()
    stopping.join()
    assert time.monotonic() - began < 2
    give_back(one)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_on_the_channel(data: bytes) -> None:
    """Whatever a back end says unasked, the device goes on, or fails once."""
    with (
        GuestMemory.create(MIB, shareable=True) as memory,
        VhostUserBackend() as backend,
        device_of(backend, memory) as device,
    ):
        failed: list[str] = []
        device.on_failure = failed.append
        with backend.channel() as channel:
            channel.sendall(data)
        assert device.config() == CONFIG
        time.sleep(0.002)
    assert len(failed) <= 1
