"""pykvm.devices.virtio.net with stream sockets: a peer of the test's own, and passt."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterator

import pytest

from pykvm.devices.virtio.device import Feature
from pykvm.devices.virtio.net import Net
from pykvm.devices.virtio.net_features import NetFeature
from pykvm.network.frame_stream import FrameStream
from pykvm.network.mac_address import mac_address
from pykvm.network.user_network import UserNetwork
from tests.rigs.net_driver import TRANSMIT, GuestInterface, NetDriver
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.virtio_driver import RING_FEATURES
from tests.rigs.waiting import is_idle, wait_for

pytestmark = pytest.mark.unit

MAC = mac_address("guest")
MERGEABLE = int(NetFeature.MRG_RXBUF)
LINUX = MERGEABLE | int(Feature.INDIRECT_DESC | Feature.EVENT_IDX)
ONE_BUFFER = bytes(10) + b"\1\0"


class Peer:
    """The other end of a device's stream."""

    def __init__(self, *, small: bool = False) -> None:
        ours, self.socket = socket.socketpair()
        if small:
            for end in (ours, self.socket):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.stream = FrameStream(ours, 65520)
        self.socket.settimeout(10)

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(struct.pack("!I", len(one)) + one for one in frames))

    def receive(self) -> bytes:
        return self.exactly(struct.unpack("!I", self.exactly(4))[0])

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the stream has ended"
            data += part
        return data


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.socket.close()


def _frame(number: int, size: int = 60) -> bytes:
    return bytes((number + n) % 251 for n in range(size))


@pytest.mark.parametrize("ring", RING_FEATURES, ids=hex)
@pytest.mark.parametrize("mergeable", [0, MERGEABLE], ids=["whole", "mergeable"])
def test_frames_both_ways(peer: Peer, ring: int, mergeable: int) -> None:
    sizes = (14, 60, 1514, 9000, 65535)
    buffer = 4096 if mergeable else 65547
    with (
        NetDriver(ring | mergeable, size=128, buffer=buffer) as driver,
        Net(driver.memory, peer.stream, MAC) as device,
    ):
        driver.start(device)
        for n in range(60):
            driver.offer(32)
            peer.send(_frame(n, sizes[n % 5]))
            [(header, frame)] = driver.received(1)
            assert frame == _frame(n, sizes[n % 5])
            count = -(-(12 + len(frame)) // buffer)
            assert header == bytes(10) + struct.pack("<H", count)
        for n in range(60):
            driver.completed(TRANSMIT, 0)
            assert driver.send(_frame(n, sizes[n % 5]), b"\xff" * 12)  # nobody looks at it
            assert peer.receive() == _frame(n, sizes[n % 5])
        wait_for(lambda: device.counters().sent == 60, 10)
        counters = device.counters()
        assert (counters.received, counters.received_bytes) == (60, 12 * sum(sizes))
        assert (counters.sent, counters.sent_bytes) == (60, 12 * sum(sizes))
        assert (counters.received_dropped, counters.sent_dropped) == (0, 0)
        driver.stop(device)


def test_a_stream_in_pieces(peer: Peer) -> None:
    """Frames that come byte by byte, and many at once."""
    with NetDriver(LINUX, size=256) as driver, Net(driver.memory, peer.stream, MAC) as device:
        driver.start(device)
        driver.offer()
        whole = b"".join(struct.pack("!I", 20 + n) + _frame(n, 20 + n) for n in range(4))
        for n in range(len(whole)):
            peer.socket.sendall(whole[n : n + 1])
        peer.send(*(_frame(n, 20 + n) for n in range(4, 200)))
        frames = [frame for _, frame in driver.received(200)]
        assert frames == [_frame(n, 20 + n) for n in range(200)]
        driver.stop(device)


def test_nobody_reads() -> None:
    """The driver's buffers wait, the thread sleeps, and all comes in the end, in order."""
    small = Peer(small=True)
    with NetDriver(LINUX, size=256) as driver, Net(driver.memory, small.stream, MAC) as device:
        driver.start(device)
        sent = 0
        while driver.send(_frame(sent, 1000 + sent)):
            sent += 1
        assert sent > 128
        wait_for(lambda: is_idle("net"), 10)
        assert 0 < device.counters().sent < sent
        for n in range(sent):
            assert small.receive() == _frame(n, 1000 + n)
        wait_for(lambda: device.counters().sent == sent, 10)
        driver.stop(device)
    small.socket.close()


def test_stopped_with_a_frame_sent_in_part() -> None:
    """The stream stays one of whole frames, over a reset too."""
    small = Peer(small=True)
    with NetDriver(LINUX) as driver, Net(driver.memory, small.stream, MAC) as device:
        driver.start(device)
        for n in range(3):
            assert driver.send(_frame(n, 60_000))
        wait_for(lambda: device.counters().sent, 10)
        driver.stop(device)
        sent = device.counters().sent
        driver.start(device)
        for n in range(3):
            assert small.receive() == _frame(n, 60_000)
        assert sent < 3
        driver.stop(device)
    small.socket.close()


def test_a_driver_without_buffers(peer: Peer) -> None:
    with NetDriver(LINUX) as driver, Net(driver.memory, peer.stream, MAC) as device:
        driver.start(device)
        peer.send(*(_frame(n) for n in range(50)))
        assert driver.received(1, 0.2) == []
        for n in range(50):
            driver.offer(1)
            assert driver.received(1) == [(ONE_BUFFER, _frame(n))]
        driver.stop(device)
        peer.send(_frame(7))  # while nobody looks
        driver.start(device)
        driver.offer(1)
        assert driver.received(1) == [(ONE_BUFFER, _frame(7))]
        driver.stop(device)


def test_frames_that_do_not_fit(peer: Peer) -> None:
    for features in (0, MERGEABLE):
        other = Peer()
        with (
            NetDriver(features, size=4, buffer=100) as driver,
            Net(driver.memory, other.stream, MAC) as device,
        ):
            driver.start(device)
            driver.offer()
            other.send(_frame(1, 5000), _frame(2, 13), b"", _frame(3))
            assert driver.received(1) == [(ONE_BUFFER, _frame(3))]
            assert device.counters().received_dropped == 3
            driver.stop(device)
        other.socket.close()


def test_what_the_guest_sends_that_is_no_frame(peer: Peer) -> None:
    chains: list[list[bytes]] = [
        [],
        [bytes(12)],
        [bytes(25)],
        [bytes(12), bytes(65536)],
        [bytes(12)] + [bytes(1)] * 60 + [bytes(1 << 17)],
    ]
    with NetDriver(LINUX) as driver, Net(driver.memory, peer.stream, MAC) as device:
        driver.start(device)
        for n, readable in enumerate(chains):
            driver.request(TRANSMIT, readable, [1])
            assert device.counters().sent_dropped == n + 1
            driver.request(TRANSMIT, [bytes(5), bytes(7) + _frame(n)[:1], _frame(n)[1:]])
            assert peer.receive() == _frame(n)
        driver.stop(device)


@pytest.mark.parametrize("rubbish", [b"\0\1\0\0", b"\xff\xff\xff\xff", b"GET "])
def test_a_peer_that_sends_rubbish(peer: Peer, rubbish: bytes) -> None:
    with NetDriver(LINUX) as driver, Net(driver.memory, peer.stream, MAC) as device:
        lost: list[str] = []
        device.on_link_lost = lost.append
        driver.start(device)
        driver.offer()
        peer.send(_frame(1))
        peer.socket.sendall(rubbish + bytes(100))
        assert driver.received(1) == [(ONE_BUFFER, _frame(1))]
        wait_for(lambda: lost, 10)
        assert not device.link
        driver.stop(device)


@pytest.mark.parametrize("starved", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_the_peer_goes(starved: bool, full: bool) -> None:
    small = Peer(small=True)
    with NetDriver(LINUX) as driver, Net(driver.memory, small.stream, MAC) as device:
        lost: list[str] = []
        device.on_link_lost = lost.append
        driver.start(device)
        if not starved:
            driver.offer()
        sent = 0
        while full and driver.send(_frame(1, 4000)):
            sent += 1
        small.socket.close()
        wait_for(lambda: lost, 10)
        assert lost == ["the other side has closed the connection"]
        assert device.config()[6:8] == b"\0\0"
        driver.completed(TRANSMIT, sent, 1)
        assert driver.pending - (0 if starved else 64) == 0
        for n in range(100):
            assert driver.send(_frame(n))
            driver.completed(TRANSMIT, 1)
        driver.stop(device)


@pytest.fixture
def network() -> Iterator[UserNetwork]:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")
    need_tun()
    namespace = NetworkNamespace()
    with namespace.entered(), UserNetwork(MAC, host=True) as made:
        yield made
    namespace.close()


@pytest.mark.parametrize("features", [0, LINUX, LINUX | Feature.RING_PACKED], ids=hex)
def test_a_guest_fetches_by_passt(network: UserNetwork, features: int) -> None:
    """8 MB from a server on this host's loopback address, and back."""
    content = os.urandom(8_000_000)
    buffer = 65547 if not features else 4096
    listener = socket.create_server(("127.0.0.1", 0))
    with (
        NetDriver(int(features), size=128, buffer=buffer) as driver,
        Net(driver.memory, network, MAC) as device,
    ):
        guest = GuestInterface(device, driver, MAC, "10.0.2.15/24", "10.0.2.2")
        with guest.namespace.entered():
            client = socket.create_connection(("10.0.2.2", listener.getsockname()[1]), timeout=30)
        server, _ = listener.accept()
        for one, other in ((server, client), (client, server)):
            one.setblocking(False)
            other.settimeout(30)
            left, received = memoryview(content), bytearray()
            while len(received) < len(content):
                try:
                    left = left[one.send(left[:65536]) :]
                except BlockingIOError:
                    received += other.recv(1 << 20)
                if not left and len(received) < len(content):
                    received += other.recv(1 << 20)
            assert received == content
        for end in (server, client, listener):
            end.close()
        guest.close()
        assert device.counters().received_bytes > len(content)
        assert device.counters().sent_bytes > len(content)


def test_passt_is_killed(network: UserNetwork) -> None:
    with NetDriver(LINUX) as driver, Net(driver.memory, network, MAC) as device:
        lost: list[str] = []
        device.on_link_lost = lost.append
        driver.start(device)
        driver.offer()
        os.kill(network._child.pid, signal.SIGKILL)
        wait_for(lambda: lost, 10)
        assert lost[0].startswith("passt has ended: ")
        driver.stop(device)
