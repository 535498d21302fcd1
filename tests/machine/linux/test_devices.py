"""pykvm.machine.linux.devices: what a configuration becomes."""

from pathlib import Path

import pytest

from pykvm.devices.virtio.block import DiskInUseError
from pykvm.devices.virtio.device import DeviceType
from pykvm.machine.linux.config import Disk, MachineConfig
from pykvm.machine.linux.devices import HostNetwork, configured_devices, configured_networks
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.specification import NetworkSpecificationError
from pykvm.sizes import MIB

pytestmark = pytest.mark.unit


def test_disks_and_entropy(tmp_path: Path) -> None:
    """A disk is its machine's alone."""
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    disks = (Disk(tmp_path / "disk.raw"),)
    config = MachineConfig(Path("vmlinuz"), disks=disks, networks=("none",))
    networks = list(configured_networks(config))
    with GuestMemory.create(MIB) as memory:
        devices = list(configured_devices(config, memory, networks))
        assert [device.type for device in devices] == [DeviceType.BLOCK, DeviceType.ENTROPY]
        with pytest.raises(DiskInUseError):
            next(configured_devices(config, memory, networks))
        for device in devices:
            device.close()
        next(configured_devices(config, memory, networks)).close()
    for network in networks:
        network.close()


def test_networks_that_cannot_be() -> None:
    with pytest.raises(NetworkSpecificationError, match="2 queues: a guest's interface has one"):
        HostNetwork("tap,queues=2", 0, "lab")


def test_addresses_follow_from_the_name() -> None:
    with HostNetwork("none", 0, "lab") as one, HostNetwork("none", 0, "lab") as other:
        assert one.mac == other.mac
        assert one.address is None
    with HostNetwork("none", 1, "lab") as second, HostNetwork("none", 0, "") as unnamed:
        assert len({one.mac, second.mac, unnamed.mac}) == 3
