"""pykvm.devices.virtio.vhost_user: what a back end is told."""

import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from pykvm.devices.virtio.device import Feature, Ring
from pykvm.devices.virtio.ring_memory import RingAddressError
from pykvm.devices.virtio.vhost_user_connection import (
    BackendGoneError,
    BackendRefusedError,
    VhostUserConnection,
)
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region, RegionError
from pykvm.sizes import GIB, MIB
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

SLOTS = 1 << 15
RESET = 1 << 13


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
        with pytest.raises(RingAddressError, match=reason):
            device.start(0, [bad])
        assert len(backend.log) == before  # the back end has heard nothing of it


def test_a_ring_twice(backend: VhostUserBackend, memory: GuestMemory) -> None:
    with device_of(backend, memory) as device:
        bad = Ring(0, 64, 0x1000, 0x2000, 0x3000, 0, -1, -1)
        with pytest.raises(RingAddressError, match="twice"):
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
