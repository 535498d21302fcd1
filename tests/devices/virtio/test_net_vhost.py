"""pykvm.devices.virtio.net_vhost: the kernel's vhost-net, where it is."""

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio.device import DeviceType, Feature
from pykvm.devices.virtio.net_features import NetFeature
from pykvm.devices.virtio.net_vhost import VHOST_NET, VhostNet
from pykvm.devices.virtio.ring_memory import RingAddressError
from pykvm.devices.virtio.vhost_kernel import VhostMissingError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.mac_address import mac_address
from pykvm.network.tap import Tap
from pykvm.sizes import MIB
from tests.rigs.device_failures import failures_of
from tests.rigs.kernel_modules import load_inside
from tests.rigs.net_driver import TRANSMIT, GuestInterface, NetDriver
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.waiting import wait_for

MAC = mac_address("guest")
MERGEABLE = int(NetFeature.MRG_RXBUF)
LINUX = (
    MERGEABLE
    | int(NetFeature.CSUM | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.HOST_TSO4)
    | int(Feature.INDIRECT_DESC | Feature.EVENT_IDX)
)


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    load_inside("tun", "bridge", "vhost_net")
    need_tun()
    made = NetworkNamespace()
    with made.entered():
        yield made
    assert set(made.interfaces()) == {"lo"}
    made.close()


@pytest.fixture
def vhost_net() -> None:
    load_inside("vhost_net")
    if not VHOST_NET.exists():
        pytest.skip(f"no {VHOST_NET}")


def quiet_tap() -> Tap:
    """A TAP to which the kernel sends nothing of its own."""
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    return Tap("t0", bridge="none")


def frame(number: int, size: int = 60) -> bytes:
    return (b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes([number % 251]) * size)[:size]


@pytest.mark.unit
def test_a_tap_stays_the_callers_without_a_device(
    namespace: NetworkNamespace, tmp_path: Path
) -> None:
    with GuestMemory.create(MIB) as memory, quiet_tap() as tap:
        with pytest.raises(VhostMissingError):
            VhostNet(memory, tap, MAC, path=tmp_path / "none")
        assert tap.descriptors


@pytest.mark.kvm
@pytest.mark.usefixtures("vhost_net")
@pytest.mark.parametrize("features", [MERGEABLE, LINUX], ids=hex)
def test_frames_both_ways(namespace: NetworkNamespace, features: int) -> None:
    # Without mergeable buffers Linux before 6.13 leaves num_buffers as it finds it.
    sizes = (60, 61, 1000, 1514)
    with (
        NetDriver(features, size=128) as driver,
        VhostNet(driver.memory, quiet_tap(), MAC) as device,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire,
    ):
        wire.bind(("t0", 0x88B5))
        wire.settimeout(10)
        assert device.type is DeviceType.NET
        assert device.features & LINUX == LINUX
        assert device.config() == bytes.fromhex(MAC.replace(":", "")) + b"\1\0\1\0\xdc\5"
        for _ in range(3):  # as after a pause
            driver.start(device)
            driver.offer()
            for n in range(50):
                wire.send(frame(n, sizes[n % 4]))
            received = driver.received(50)
            assert [one for _, one in received] == [frame(n, sizes[n % 4]) for n in range(50)]
            for n in range(50):
                driver.completed(TRANSMIT, 0)
                assert driver.send(frame(n, sizes[n % 4]))
                assert wire.recv(4096) == frame(n, sizes[n % 4])
            driver.stop(device)


@pytest.mark.kvm
@pytest.mark.usefixtures("vhost_net")
def test_a_connection_of_two_kernels(namespace: NetworkNamespace) -> None:
    """2 MB there and back over TCP, with checksums and segments left to the other one."""
    content = bytes(range(251)) * 8000
    with (
        NetDriver(LINUX, size=256) as driver,
        VhostNet(driver.memory, Tap(), MAC) as device,
        socket.create_server(("10.187.0.1", 0)) as listener,
    ):

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(60)
                connection.sendall(connection.makefile("rb").read(len(content)))

        server = threading.Thread(target=echo)
        server.start()
        guest = GuestInterface(device, driver, MAC, "10.187.0.9/24")
        with guest.namespace.entered():
            connection = socket.create_connection(listener.getsockname(), timeout=60)
        with connection, connection.makefile("rb") as stream:
            connection.sendall(content)
            assert stream.read(len(content)) == content
        server.join()
        guest.close()


@pytest.mark.kvm
@pytest.mark.usefixtures("vhost_net")
def test_a_ring_that_is_not_well_formed(namespace: NetworkNamespace) -> None:
    with NetDriver() as driver, VhostNet(driver.memory, quiet_tap(), MAC) as device:
        driver.start(device)
        for _ in range(2):  # its driver resets the device, and does it again
            failures = failures_of(device)
            ring = driver.queues[TRANSMIT].ring()
            driver.memory.write(ring.driver + 2, struct.pack("<H", 1000))  # more than it has
            for _ in range(3):
                os.eventfd_write(ring.kick, 1)
            assert failures() == ["vhost-net has met an error in a virtqueue"]
            device.stop()
            driver.memory.write(ring.driver + 2, bytes(2))
            driver.start(device)
        device.stop()
        with pytest.raises(RingAddressError, match="twice"):
            device.start(driver.features, [driver.queues[0].ring()] * 2)


@pytest.mark.kvm
@pytest.mark.usefixtures("vhost_net")
@pytest.mark.parametrize("sends", [False, True], ids=["idle", "sending"])
def test_the_tap_vanishes(namespace: NetworkNamespace, sends: bool) -> None:
    with NetDriver(MERGEABLE) as driver, VhostNet(driver.memory, quiet_tap(), MAC) as device:
        lost: list[str] = []
        links: list[int] = []
        device.on_link_lost = lost.append
        device.on_config = lambda: links.append(device.config()[6])
        device.on_failure = lost.append
        driver.start(device)
        driver.offer()
        subprocess.run(["ip", "link", "del", "t0"], check=True)
        for n in range(20 if sends else 0):
            assert driver.send(frame(n))
        wait_for(lambda: lost, 10)
        assert lost == ["t0: the TAP is gone"]
        assert links == [0]
        assert not device.link
        for _ in range(2):
            device.stop()
            driver.start(device)
        assert len(lost) == 1
