"""Devices of the kernel's vhost: what can be refused anywhere, and the real thing where it is."""

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from pykvm.devices.virtio import net_offloads
from pykvm.devices.virtio._vhost import ffi, lib
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.failure_watch import FailureWatch
from pykvm.devices.virtio.net_offloads import NetError, features_of, offloads_of, prepare_tap
from pykvm.devices.virtio.net_vhost import VHOST_NET, VhostNet
from pykvm.devices.virtio.ring_memory import RingError
from pykvm.devices.virtio.vhost_kernel import (
    VhostError,
    VhostKernel,
    VhostMissingError,
    VhostPermissionError,
)
from pykvm.devices.virtio.vsock import VHOST_VSOCK, CidError, VhostVsock
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.device_failures import failures_of
from tests.rigs.forks import in_fork
from tests.rigs.virtio_driver import VirtioDriver

MAC = bytes.fromhex("52540a0b0c0d")
HOST = bytes.fromhex("52540a0b0c0e")
EXPERIMENTAL = b"\x88\xb5"
CID = 4242

TUNSETIFF = 0x400454CA


@contextmanager
def tap(flags: int = lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR) -> Iterator[tuple[int, str]]:
    """Make a TAP that is up; give its descriptor and its name."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        pytest.skip(f"no usable /dev/net/tun: {error.strerror}")
    try:
        try:
            answer = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"vt%d", flags))
        except PermissionError:
            pytest.skip("not allowed to make a TAP")
        name = answer[:16].rstrip(b"\0").decode()
        with IPRoute() as route:
            route.link("set", index=socket.if_nametoindex(name), state="up")
        yield fd, name
    finally:
        os.close(fd)


def need(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"no {path}")


# ---- what needs no vhost ------------------------------------------------------------------------


@pytest.mark.unit
def test_layouts() -> None:
    """Sizes of linux/vhost.h on 64-bit machines, which the kernel's own ioctl numbers hold too."""
    for name, size in (
        ("struct vhost_vring_state", 8),
        ("struct vhost_vring_file", 8),
        ("struct vhost_vring_addr", 40),
        ("struct vhost_memory", 8),
        ("struct vhost_memory_region", 32),
        ("struct virtio_vsock_config", 8),
    ):
        assert ffi.sizeof(name) == size
    assert lib.VHOST_SET_OWNER == 0xAF01
    assert lib.VHOST_SET_MEM_TABLE == 0x4008AF03
    assert lib.VHOST_SET_VRING_ADDR == 0x4028AF11
    assert lib.VHOST_GET_VRING_BASE == 0xC008AF12
    assert lib.VHOST_NET_SET_BACKEND == 0x4008AF30
    assert lib.VHOST_VSOCK_SET_GUEST_CID == 0x4008AF60
    assert lib.VHOST_VSOCK_SET_RUNNING == 0x4004AF61
    assert net_offloads.HEADER_SIZE == 12


@pytest.mark.unit
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with GuestMemory.create(MIB) as memory:
        with pytest.raises(VhostMissingError, match=r"no .*/none here") as caught:
            VhostVsock(3, memory, path=tmp_path / "none")
        assert caught.value.next_step
        for other in ("/dev/null", tmp_path / "file"):
            (tmp_path / "file").touch()
            with pytest.raises(VhostError, match=f"{other} refuses VHOST_SET_OWNER with ENOTTY"):
                VhostKernel(Path(other), "vhost_net")
        with pytest.raises(VhostError, match="is a directory"):
            VhostKernel(tmp_path, "vhost_net")


@pytest.mark.unit
def test_a_device_that_this_user_may_not_open(tmp_path: Path) -> None:
    path = tmp_path / "vhost-net"
    path.touch(0)

    def as_nobody() -> None:
        if not os.geteuid():
            for parent in (tmp_path, *tmp_path.parents):
                if not os.stat(parent).st_mode & 1:
                    parent.chmod(parent.stat().st_mode | 0o11)
            os.setuid(65534)
        with pytest.raises(VhostPermissionError, match="no permission for"):
            VhostKernel(path, "vhost_net")

    in_fork(as_nobody)


@pytest.mark.unit
def test_context_ids() -> None:
    with GuestMemory.create(MIB) as memory:
        for cid in (-1, 0, 1, 2, 0xFFFF_FFFF, 1 << 32):
            with pytest.raises(CidError, match="use 3 to 4294967294"):
                VhostVsock(cid, memory)


@pytest.mark.unit
def test_network_devices_that_cannot_be() -> None:
    with GuestMemory.create(MIB) as memory, tap() as (fd, _):
        for mac in (b"", MAC[:5], b"\x01" + MAC[1:], bytes(6)):
            with pytest.raises(NetError, match="MAC address"):
                VhostNet(fd, mac, memory)
        for mtu in (1, 67, 65536, -1):
            with pytest.raises(NetError, match=r"use 68 to 65535"):
                VhostNet(fd, MAC, memory, mtu=mtu)
        with open("/dev/null", "rb") as null, pytest.raises(NetError, match="is no TAP"):
            VhostNet(null.fileno(), MAC, memory)


@pytest.mark.unit
@pytest.mark.parametrize("flags", [lib.IFF_TAP | lib.IFF_NO_PI, 1 | lib.IFF_NO_PI])
def test_a_tap_without_headers(flags: int) -> None:
    with tap(flags) as (fd, _), pytest.raises(NetError, match="IFF_VNET_HDR"):
        prepare_tap(fd)


@pytest.mark.unit
def test_offloads_of_a_tap() -> None:
    with tap() as (fd, _):
        offloads = prepare_tap(fd)
        assert offloads == lib.TUN_F_CSUM | lib.TUN_F_TSO4 | lib.TUN_F_TSO6 | lib.TUN_F_TSO_ECN
        size = fcntl.ioctl(fd, lib.TUNGETVNETHDRSZ, bytes(4))
        assert struct.unpack("i", size) == (12,)
        features = features_of(offloads)
        assert features == 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13
        # Whatever a driver accepts, the TAP takes what follows from it.
        for accepted in range(1 << 14):
            if accepted & ~features == 0:
                fcntl.ioctl(fd, lib.TUNSETOFFLOAD, offloads_of(accepted))
        assert offloads_of(features) == offloads
        assert offloads_of(features & ~(1 << 1)) == 0  # no segments without checksums
        assert features_of(0) == 1 << 0 | 1 << 11 | 1 << 12 | 1 << 13


@pytest.mark.unit
def test_the_configuration_of_a_network_device() -> None:
    assert net_offloads.net_config(MAC, 9000) == MAC + struct.pack("<HHH", 1, 1, 9000)


@pytest.mark.unit
def test_a_tap_that_vanishes() -> None:
    with tap() as (fd, name):
        happened = threading.Event()
        reasons: list[str] = []

        def note(reason: str) -> None:
            reasons.append(reason)
            happened.set()

        with FailureWatch("test", note, {}, {fd: "gone"}):
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
                wire.bind((name, 0))
                wire.send(MAC + HOST + EXPERIMENTAL + bytes(50))  # frames are no failure
            assert not happened.wait(0.1)
            with IPRoute() as route:
                route.link("del", index=socket.if_nametoindex(name))
            assert happened.wait(5)
        assert reasons == ["gone"]


@pytest.mark.unit
def test_a_watch_that_is_closed() -> None:
    event = os.eventfd(0)
    watch = FailureWatch("test", pytest.fail, {event: "written"}, {})
    watch.close()
    watch.close()
    os.eventfd_write(event, 1)
    os.close(event)


# ---- the kernel's vhost -------------------------------------------------------------------------


@pytest.mark.kvm
def test_frames() -> None:
    need(VHOST_NET)
    with (
        GuestMemory.create(4 * MIB) as memory,
        VirtioDriver([64, 64], memory=memory) as driver,
        tap() as (fd, name),
        VhostNet(fd, MAC, memory, mtu=1500) as device,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as wire,
    ):
        wire.bind((name, 0x88B5))
        wire.settimeout(10)
        assert device.type is DeviceType.NET
        assert device.config() == MAC + struct.pack("<HHH", 1, 1, 1500)
        assert device.features & 1 << 15  # mergeable buffers
        for _ in range(2):  # as after a pause
            driver.start(device)
            frame = HOST + MAC + EXPERIMENTAL + b"from the guest".ljust(60, b".")
            driver.request(1, [bytes(12), frame])
            assert wire.recv(2000) == frame
            answer = MAC + HOST + EXPERIMENTAL + b"from the host".ljust(60, b".")
            for _ in range(16):
                driver.submit(0, writable=[2048])
            driver.kick(0, always=True)
            wire.send(answer)
            frames: list[bytes] = []
            while answer not in frames:  # the host's own IPv6 sends some
                frames += [one.data[12:] for one in driver.completed(0, 1)]
            driver.stop(device)


@pytest.mark.kvm
def test_a_ring_that_is_not_well_formed() -> None:
    need(VHOST_NET)
    with (
        GuestMemory.create(4 * MIB) as memory,
        VirtioDriver([64, 64], memory=memory) as driver,
        tap() as (fd, _),
        VhostNet(fd, MAC, memory) as device,
    ):
        failure = failures_of(device)
        driver.start(device)
        ring = driver.queues[1].ring()
        memory.write(ring.driver + 2, struct.pack("<H", 1000))  # more than the ring has
        os.eventfd_write(ring.kick, 1)
        assert failure()[-1] == "vhost-net has met an error in a virtqueue"
        device.stop()
        bad = [driver.queues[0].ring(), driver.queues[0].ring()]
        with pytest.raises(RingError):
            device.start(driver.features, bad)


@pytest.mark.kvm
def test_a_network_device_whose_tap_vanishes() -> None:
    need(VHOST_NET)
    with (
        GuestMemory.create(4 * MIB) as memory,
        VirtioDriver([64, 64], memory=memory) as driver,
        tap() as (fd, name),
        VhostNet(fd, MAC, memory) as device,
    ):
        failure = failures_of(device)
        driver.start(device)
        with IPRoute() as route:
            route.link("del", index=socket.if_nametoindex(name))
        assert failure()[-1] == "the TAP of a network device is gone"
        device.stop()
        with pytest.raises(VhostError, match="refuses its offloads"):
            driver.start(device)


@pytest.mark.kvm
def test_a_connection_of_the_host() -> None:
    need(VHOST_VSOCK)
    header = struct.Struct("<QQIIIHHIII")
    request, response, data = 1, 2, 5
    with (
        GuestMemory.create(4 * MIB) as memory,
        VirtioDriver([64, 64, 16], memory=memory) as driver,
        VhostVsock(CID, memory) as device,
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client,
    ):
        assert device.config() == struct.pack("<Q", CID)
        with pytest.raises(CidError, match="is another guest's"):
            VhostVsock(CID, memory)
        driver.start(device)
        for _ in range(8):
            driver.submit(0, writable=[4096])
        driver.kick(0, always=True)
        client.settimeout(10)
        connected = threading.Thread(target=client.connect, args=((CID, 99),))
        connected.start()
        (first,) = driver.completed(0, 1)
        source, target, from_port, to_port, *_, kind, op, _, _, _ = header.unpack_from(first.data)
        assert (source, target, to_port, kind, op) == (2, CID, 99, 1, request)
        answer = header.pack(CID, 2, 99, from_port, 0, 1, response, 0, 1 << 16, 0)
        driver.request(1, [answer])
        connected.join(10)
        client.sendall(b"hello")
        (second,) = driver.completed(0, 1)
        assert header.unpack_from(second.data)[6] == data
        assert second.data[header.size :] == b"hello"
        assert device.stop()[2] == 0  # nobody has taken of the events' queue


@pytest.mark.kvm
def test_a_forked_process_has_no_device() -> None:
    need(VHOST_VSOCK)
    with GuestMemory.create(MIB) as memory, VhostVsock(CID, memory) as device:

        def child() -> None:
            with pytest.raises(Exception, match="before this process was forked"):
                device.start(0, [])

        in_fork(child)
