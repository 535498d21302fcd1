"""Devices go on in a sandbox: disks of ours, and programs that were started before."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from pykvm.devices.virtio.backend_process import BackendMissingError
from pykvm.devices.virtio.block import Block, DiskFile
from pykvm.devices.virtio.fs import VirtioFs, find_virtiofsd
from pykvm.devices.virtio.net import Net
from pykvm.devices.virtio.storage_daemon import StorageDaemonDisk
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.mac_address import mac_address
from pykvm.network.tap import Tap
from pykvm.sandbox import Confinement, enter
from pykvm.sizes import MIB
from tests.rigs.confined import in_child
from tests.rigs.fuse_session import FuseSession
from tests.rigs.net_driver import TRANSMIT, NetDriver
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.virtio_disk import DISCARD, OK, DiskDriver
from tests.rigs.virtio_driver import RING_FEATURES, VirtioDriver

pytestmark = pytest.mark.unit

FLUSH = 1 << 9


@pytest.mark.parametrize("started", [False, True], ids=["before", "after"])
def test_a_disk(started: bool, tmp_path: Path) -> None:
    """Its device starts before or after the process enters, as that of a restored machine does."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))

    def body() -> bytes:
        with DiskDriver([64], RING_FEATURES[0] | FLUSH) as driver:
            device = Block(driver.memory, DiskFile(path))
            if started:
                driver.start(device)
            enter(Confinement())
            if not started:
                driver.start(device)
            driver.write(3, b"sector".ljust(512))
            driver.flush()
            said = driver.read(3, 512)
            driver.stop(device)
            driver.start(device)
            driver.ask(DISCARD, data=(0).to_bytes(8, "little") + b"\1\0\0\0" + bytes(4))
            device.close()
        return said

    assert in_child(body).startswith(b"sector  ")
    assert path.read_bytes()[3 * 512 :].startswith(b"sector  ")


def test_a_directory_of_the_host(tmp_path: Path) -> None:
    """virtiofsd is told to end, and waited for, from inside."""
    try:
        find_virtiofsd()
    except BackendMissingError as error:
        pytest.skip(str(error))
    (tmp_path / "hello").write_text("hello from the host\n")

    def body() -> list[str]:
        with (
            GuestMemory.create(4 * MIB, shareable=True) as memory,
            VirtioDriver([64, 64], memory=memory) as driver,
            VirtioFs("root", tmp_path, memory) as device,
        ):
            enter(Confinement())
            driver.start(device)
            session = FuseSession(driver)
            said = session.read("hello").decode()
            try:
                (tmp_path / "hello").read_text()
            except PermissionError:
                said += "not by the monitor"
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            said += ", nothing is left"
        return said.splitlines()

    assert in_child(body) == ["hello from the host", "not by the monitor, nothing is left"]


def test_a_storage_daemon(tmp_path: Path) -> None:
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("no qemu-storage-daemon")
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))

    def body() -> int:
        with (
            GuestMemory.create(4 * MIB, shareable=True) as memory,
            DiskDriver([128], memory=memory) as driver,
            StorageDaemonDisk(path, memory) as device,
        ):
            enter(Confinement())
            driver.start(device)
            driver.write(5, b"daemon".ljust(512))
            driver.stop(device)
            return OK

    assert in_child(body) == OK
    assert path.read_bytes()[5 * 512 :].startswith(b"daemon")


def test_a_tap() -> None:
    """What its features allow is set when the guest's driver starts, without a capability."""
    need_tun()
    namespace = NetworkNamespace()

    def body() -> list[int]:
        # The kernel sends nothing of its own then.
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        with (
            NetDriver(RING_FEATURES[0], size=128, buffer=2048) as driver,
            Net(driver.memory, Tap("t0", bridge="none"), mac_address("guest")) as device,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire,
        ):
            wire.bind(("t0", 0x88B5))
            wire.settimeout(20)
            enter(Confinement())
            driver.start(device)
            driver.offer()
            frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes(1000)
            wire.send(frame)
            [(_, received)] = driver.received(1)
            driver.completed(TRANSMIT, 0)
            assert driver.send(frame)
            sizes = [len(frame), len(received), len(wire.recv(4096))]
            driver.stop(device)
        return sizes

    with namespace.entered():
        assert in_child(body) == [1014] * 3
    assert set(namespace.interfaces()) == {"lo"}
    namespace.close()
