"""pykvm.devices.virtio.net with TAPs of this kernel, in a network namespace."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio.device import Feature
from pykvm.devices.virtio.net import Net
from pykvm.devices.virtio.net_features import NetFeature
from pykvm.network.mac_address import mac_address
from pykvm.network.tap import Tap
from tests.rigs.net_driver import TRANSMIT, GuestInterface, NetDriver
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.virtio_driver import RING_FEATURES
from tests.rigs.virtio_rings import Buffer
from tests.rigs.waiting import is_idle, wait_for

pytestmark = pytest.mark.unit

MAC = mac_address("guest")
MERGEABLE = int(NetFeature.MRG_RXBUF)
LINUX = (
    MERGEABLE
    | int(NetFeature.CSUM | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.HOST_TSO4)
    | int(Feature.INDIRECT_DESC | Feature.EVENT_IDX)
)
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    need_tun()
    made = NetworkNamespace()
    with made.entered():
        yield made
    assert set(made.interfaces()) == {"lo"}
    made.close()


def _quiet_tap() -> Tap:
    """A TAP to which the kernel sends nothing of its own."""
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    return Tap("t0", bridge="none")


def _wire(name: str = "t0", *, headers: bool = False) -> socket.socket:
    """A socket for all frames of an interface."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    if headers:
        wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    wire.bind((name, 0 if headers else 0x88B5))
    wire.settimeout(10)
    return wire


def _frame(number: int, size: int = 60) -> bytes:
    """A frame of the protocol for experiments, each byte of which says which one it is."""
    content = bytes((number + n) % 251 for n in range(max(size - 14, 0)))
    return (b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + content)[:size]


@pytest.mark.parametrize("ring", RING_FEATURES, ids=hex)
@pytest.mark.parametrize("mergeable", [0, MERGEABLE], ids=["whole", "mergeable"])
def test_frames_both_ways(namespace: NetworkNamespace, ring: int, mergeable: int) -> None:
    sizes = (60, 61, 1000, 1514)
    with (
        NetDriver(ring | mergeable, size=128, buffer=2048) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        driver.start(device)
        driver.offer()
        for n in range(100):
            wire.send(_frame(n, sizes[n % 4]))
        received = driver.received(100)
        assert [frame for _, frame in received] == [_frame(n, sizes[n % 4]) for n in range(100)]
        assert {header for header, _ in received} == {bytes(10) + b"\1\0"}
        for n in range(100):
            driver.completed(TRANSMIT, 0)
            assert driver.send(_frame(n, sizes[n % 4]))
            assert wire.recv(4096) == _frame(n, sizes[n % 4])
        wait_for(lambda: device.counters().sent == 100, 10)
        counters = device.counters()
        bytes_of_all = 25 * sum(sizes)
        assert (counters.received, counters.received_bytes) == (100, bytes_of_all)
        assert (counters.sent, counters.sent_bytes) == (100, bytes_of_all)
        assert (counters.received_dropped, counters.sent_dropped) == (0, 0)
        wait_for(lambda: is_idle("net"), 10)
        driver.stop(device)


@pytest.mark.parametrize("ring", [0, int(Feature.RING_PACKED)], ids=["split", "packed"])
@pytest.mark.parametrize("buffer", [5, 13, 100, 1500, 1526, 4096])
def test_a_frame_in_several_buffers(namespace: NetworkNamespace, ring: int, buffer: int) -> None:
    with (
        NetDriver(ring | MERGEABLE, size=512, buffer=buffer) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        device.queue_sizes = (512, 512)
        driver.start(device)
        for n in range(60):
            driver.offer()
            size = 1200 if buffer < 10 else (60, 1514, 700)[n % 3]
            wire.send(_frame(n, size))
            [(header, frame)] = driver.received(1)
            assert frame == _frame(n, size)
            assert header == bytes(10) + struct.pack("<H", -(-(12 + size) // buffer))
        assert device.counters().received == 60
        driver.stop(device)


def test_a_frame_larger_than_all_buffers(namespace: NetworkNamespace) -> None:
    """It is dropped, and the next one comes."""
    for features, count in ((0, 8), (MERGEABLE, 8)):
        with (
            NetDriver(features, size=8, buffer=100) as driver,
            Net(driver.memory, _quiet_tap(), MAC) as device,
            _wire() as wire,
        ):
            driver.start(device)
            assert driver.offer() == count
            for n in range(20):
                wire.send(_frame(n, 1514))
                wire.send(_frame(n, 70))
                [(_, frame)] = driver.received(1)
                assert frame == _frame(n, 70)
                driver.offer()
            assert device.counters().received_dropped == 20
            driver.stop(device)


@pytest.mark.parametrize("features", [MERGEABLE, MERGEABLE | Feature.EVENT_IDX], ids=hex)
def test_a_driver_without_buffers(namespace: NetworkNamespace, features: int) -> None:
    """Frames wait in the TAP, the thread sleeps, and no wake-up is lost."""
    with (
        NetDriver(features) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        driver.start(device)
        for start in range(0, 200, 20):
            for n in range(20):
                wire.send(_frame(start + n))
            wait_for(lambda: is_idle("net"), 10)
            assert device.counters().received == start
            for n in range(20):
                assert driver.offer(1) == 1
                assert driver.received(1)[0][1] == _frame(start + n)
        driver.stop(device)


def test_a_large_frame_that_waits_for_buffers(namespace: NetworkNamespace) -> None:
    """A part of it is in the driver's memory already; and it is dropped with a stop."""
    with (
        NetDriver(MERGEABLE, buffer=200) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        driver.start(device)
        driver.offer(2)
        wire.send(_frame(1, 1514))
        wait_for(lambda: is_idle("net"), 10)
        assert driver.received(1, 0.1) == []
        driver.offer(3)
        wait_for(lambda: is_idle("net"), 10)
        driver.offer(3)
        assert driver.received(1)[0][1] == _frame(1, 1514)
        driver.offer(2)
        wire.send(_frame(2, 1514))
        wait_for(lambda: is_idle("net"), 10)
        driver.stop(device)
        assert device.counters().received_dropped == 1
        driver.start(device)
        driver.offer(6)
        wire.send(_frame(3, 1514))
        assert driver.received(1)[0][1] == _frame(3, 1514)
        driver.stop(device)


def test_segments_that_the_guest_takes_apart(namespace: NetworkNamespace) -> None:
    """A frame of 60 KB, as the driver has accepted; and the kernel's own segments else."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 60040, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~total & 0xFFFF) + ip[12:]
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 1000, 0, 0)
    content = bytes(n % 251 for n in range(60000))
    frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x08\x00" + ip + tcp + content
    # struct virtio_net_hdr: NEEDS_CSUM, TCPV4, hdr_len, gso_size, csum_start, csum_offset
    header = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
    for features in (LINUX, MERGEABLE):
        with (
            NetDriver(features, size=256, buffer=1526) as driver,
            Net(driver.memory, _quiet_tap(), MAC) as device,
            _wire(headers=True) as wire,
        ):
            driver.start(device)
            driver.offer()
            wire.send(header + frame)
            if features == LINUX:
                [(got, whole)] = driver.received(1)
                assert whole[54:] == content
                assert got == header + struct.pack("<H", 40)
            else:
                segments = driver.received(42)
                assert b"".join(segment[54:] for _, segment in segments) == content
                assert {got[:2] for got, _ in segments} == {bytes(2)}
            wire.send(header + frame)  # now large frames are expected, or small ones again
            assert driver.received(1)
            driver.stop(device)


def test_what_is_no_frame_is_dropped(namespace: NetworkNamespace) -> None:
    chains: list[tuple[list[bytes], list[int]]] = [
        ([], [100]),
        ([bytes(1)], []),
        ([bytes(12)], []),
        ([bytes(12), bytes(13)], []),
        ([bytes(25)], [10]),
        ([bytes(12), bytes(65536), bytes(19)], []),
        ([struct.pack("<BBHHHHH", 1, 1, 60000, 0, 60000, 60000, 0), _frame(1)], []),
        ([b"\xff" * 12, _frame(1)], []),
    ]
    with (
        NetDriver(Feature.INDIRECT_DESC) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        driver.start(device)
        for n, (readable, writable) in enumerate(chains):
            assert driver.request(TRANSMIT, readable, writable).written == 0
            assert device.counters().sent_dropped == n + 1
            assert driver.send(_frame(n))
            assert wire.recv(4096) == _frame(n)
            driver.completed(TRANSMIT, 1)
        # Its header split in the middle, and a part in each byte.
        whole = bytes(12) + _frame(7)
        driver.request(TRANSMIT, [whole[n : n + 1] for n in range(60)] + [whole[60:]])
        assert wire.recv(4096) == _frame(7)
        driver.stop(device)


def test_buffers_that_are_none(namespace: NetworkNamespace) -> None:
    """A driver offers what cannot hold a frame: it has it back empty."""
    with (
        NetDriver(MERGEABLE) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        driver.start(device)
        driver.submit(0, [bytes(2000)], [])
        driver.submit(0, [bytes(20)], [2000])
        driver.kick(0)
        assert [request.written for request in driver.completed(0, 2)] == [0, 0]
        driver.offer()
        wire.send(_frame(1))
        assert driver.received(1)[0][1] == _frame(1)
        driver.stop(device)


@pytest.mark.parametrize("queue", [0, 1])
def test_a_broken_queue(namespace: NetworkNamespace, queue: int) -> None:
    with NetDriver(MERGEABLE) as driver, Net(driver.memory, _quiet_tap(), MAC) as device:
        reasons: list[str] = []
        device.on_failure = reasons.append
        driver.start(device)
        driver.queues[queue].make_available([Buffer(1 << 40, 100, queue == 0)])
        driver.kick(queue)
        wait_for(lambda: reasons, 10)
        assert reasons == ["a buffer outside of guest memory"]
        assert device.link
        driver.stop(device)


@pytest.mark.parametrize("starved", [False, True], ids=["buffers", "starved"])
def test_the_tap_vanishes(namespace: NetworkNamespace, starved: bool) -> None:
    with NetDriver(MERGEABLE) as driver, Net(driver.memory, _quiet_tap(), MAC) as device:
        lost: list[str] = []
        changes: list[bytes] = []
        device.on_link_lost = lost.append
        device.on_config = lambda: changes.append(device.config())
        driver.start(device)
        if not starved:
            driver.offer()
        assert device.config() == bytes.fromhex(MAC.replace(":", "")) + b"\1\0\1\0\xdc\5"
        subprocess.run(["ip", "link", "del", "t0"], check=True)
        wait_for(lambda: lost, 10)
        assert lost == ["t0: the TAP is gone"]
        assert not device.link
        assert changes == [bytes.fromhex(MAC.replace(":", "")) + b"\0\0\1\0\xdc\5"]
        for n in range(100):  # the driver goes on; nothing is stuck
            assert driver.send(_frame(n))
            driver.completed(TRANSMIT, 1)
        assert device.counters().sent_dropped == 100
        wait_for(lambda: is_idle("net"), 10)
        driver.stop(device)
        driver.start(device)
        assert driver.send(_frame(1))
        driver.completed(TRANSMIT, 1)
        driver.stop(device)
        assert len(lost) == 1


def test_an_interface_that_is_switched_off_and_on(namespace: NetworkNamespace) -> None:
    with (
        NetDriver(MERGEABLE) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
    ):
        driver.start(device)
        driver.offer()
        subprocess.run(["ip", "link", "set", "t0", "down"], check=True)
        assert driver.send(_frame(1))
        driver.completed(TRANSMIT, 1)
        assert device.counters().sent_dropped == 1
        assert device.link
        wait_for(lambda: is_idle("net"), 10)
        subprocess.run(["ip", "link", "set", "t0", "up"], check=True)
        with _wire() as wire:
            assert driver.send(_frame(2))
            assert wire.recv(4096) == _frame(2)
        driver.stop(device)


def test_offloads_that_depend_on_what_was_refused(namespace: NetworkNamespace) -> None:
    with NetDriver(LINUX) as driver, Net(driver.memory, _quiet_tap(), MAC) as device:
        assert device.features & LINUX == LINUX
        for dependent in (NetFeature.GUEST_TSO4, NetFeature.GUEST_CSUM | NetFeature.GUEST_ECN):
            device.start(int(driver.features & ~NetFeature.GUEST_CSUM | dependent), [])
            device.stop()


def test_stopped_and_started_in_the_midst(namespace: NetworkNamespace) -> None:
    """Whatever comes, comes whole and in order, and the driver has all of its buffers back."""
    with (
        NetDriver(LINUX, buffer=700) as driver,
        Net(driver.memory, _quiet_tap(), MAC) as device,
        _wire() as wire,
    ):
        ended = threading.Event()

        def flood() -> None:
            n = 0
            while not ended.is_set():
                wire.send(struct.pack("!14sI", _frame(0, 14), n) + bytes(1200))
                n += 1
                time.sleep(0.0002)

        driver.start(device)
        driver.offer()
        thread = threading.Thread(target=flood)
        thread.start()
        seen = []
        for _ in range(60):
            seen += [struct.unpack_from("!I", frame, 14)[0] for _, frame in driver.received(8)]
            driver.stop(device)
            driver.start(device)
            driver.offer()
        ended.set()
        thread.join()
        driver.stop(device)
        assert len(seen) > 300
        assert seen == sorted(set(seen))


def test_closing(namespace: NetworkNamespace) -> None:
    """What has passed can be read afterwards, and nothing is left."""
    before = sorted(os.listdir("/proc/self/fd"))
    with NetDriver(MERGEABLE) as driver:
        device = Net(driver.memory, Tap(), MAC)
        driver.start(device)
        driver.send(_frame(1))
        driver.completed(TRANSMIT, 1)
        assert device.link
        device.close()
        device.close()
        assert device.counters().sent == 1
        assert device.config()[:6].hex(":") == MAC
        assert set(namespace.interfaces()) == {"lo"}
    wait_for(lambda: sorted(os.listdir("/proc/self/fd")) == before, 10)


def _serve(address: str, content: bytes) -> socket.socket:
    """A server that sends `content` to who connects, and then wants it back."""
    listener = socket.create_server((address, 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            connection.sendall(content)
            back = connection.makefile("rb").read(len(content))
            connection.sendall(b"same" if back == content else b"else")

    threading.Thread(target=run, daemon=True).start()
    return listener


@pytest.mark.parametrize("features", [0, MERGEABLE, LINUX, LINUX | Feature.RING_PACKED], ids=hex)
def test_a_connection_of_two_kernels(namespace: NetworkNamespace, features: int) -> None:
    """20 MB each way over TCP, with checksums and segments left to the other one, or not."""
    content = bytes(range(251)) * 80_000
    with (
        NetDriver(int(features), size=256, buffer=2048) as driver,
        Net(driver.memory, Tap(), MAC) as device,
    ):
        guest = GuestInterface(device, driver, MAC, "10.187.0.9/24")
        listener = _serve("10.187.0.1", content)
        with guest.namespace.entered():
            connection = socket.create_connection(listener.getsockname(), timeout=30)
        with connection, connection.makefile("rb") as stream:
            assert stream.read(len(content)) == content
            connection.sendall(content)
            assert stream.read(4) == b"same"
        listener.close()
        guest.close()
        counters = device.counters()
        assert counters.received_dropped == 0
        if features & NetFeature.GUEST_TSO4:
            assert counters.received_bytes / counters.received > 3000  # large segments
            assert counters.sent_bytes / counters.sent > 1000
