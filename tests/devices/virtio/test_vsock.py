"""pykvm.devices.virtio.vsock: the kernel's vhost-vsock, where it is."""

import socket
import struct
import threading

import pytest

from pykvm.closeable import ForkedProcessError
from pykvm.devices.virtio.vsock import VHOST_VSOCK, CidError, VhostVsock
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.forks import in_fork
from tests.rigs.kernel_modules import load_inside
from tests.rigs.virtio_driver import VirtioDriver

pytestmark = pytest.mark.kvm

CID = 4242


@pytest.fixture(autouse=True)
def _vhost_vsock() -> None:
    load_inside("vhost_vsock")
    if not VHOST_VSOCK.exists():
        pytest.skip(f"no {VHOST_VSOCK}")


def test_a_connection_of_the_host() -> None:
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


def test_a_forked_process_has_no_device() -> None:
    with GuestMemory.create(MIB) as memory, VhostVsock(CID, memory) as device:

        def child() -> None:
            with pytest.raises(ForkedProcessError):
                device.start(0, [])

        in_fork(child)
