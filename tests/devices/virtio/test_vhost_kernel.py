"""pykvm.devices.virtio.vhost_kernel: layouts, and what can be refused anywhere."""

import os
import select
import threading
from pathlib import Path

import pytest

from pykvm.devices.virtio._vhost import ffi, lib
from pykvm.devices.virtio.failure_watch import FailureWatch
from pykvm.devices.virtio.vhost_kernel import (
    VhostError,
    VhostKernel,
    VhostMissingError,
    VhostPermissionError,
)
from pykvm.devices.virtio.vsock import CidError, VhostVsock
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.forks import in_fork

pytestmark = pytest.mark.unit


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


def test_context_ids() -> None:
    with GuestMemory.create(MIB) as memory:
        for cid in (-1, 0, 1, 2, 0xFFFF_FFFF, 1 << 32):
            with pytest.raises(CidError, match="use 3 to 4294967294"):
                VhostVsock(cid, memory)


def test_a_watch() -> None:
    event, (reader, writer) = os.eventfd(0), os.pipe()
    called = threading.Semaphore(0)
    broken = threading.Event()
    with FailureWatch("test", {event: called.release}, {reader: broken.set}):
        for _ in range(3):
            os.eventfd_write(event, 1)
            assert called.acquire(timeout=5)
        os.write(writer, b"what can be read is no failure")
        assert not broken.wait(1.2)
        os.close(writer)
        assert broken.wait(5)
    for fd in (event, reader):
        os.close(fd)


def test_a_watch_that_is_closed() -> None:
    event = os.eventfd(0)
    watch = FailureWatch("test", {event: pytest.fail}, {})
    watch.close()
    watch.close()
    os.eventfd_write(event, 1)
    assert select.select([event], [], [], 0.1)[0]  # nobody has taken it
    os.close(event)
