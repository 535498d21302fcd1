"""The virtio devices of a machine, from its configuration, in the order in which they are found.

Where the kernel of the host has a data plane (vhost-net) it is taken, else the one in C. What a
machine does not have is not imported.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pykvm.closeable import Closeable
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.entropy import Entropy
from pykvm.machine.linux.config import Disk, MachineConfig
from pykvm.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from pykvm.network.addresses import StaticAddress

__all__ = ["HostNetwork", "configured_devices", "configured_networks"]

_UNNAMED: Final = "pykvm"
_VHOST_NET: Final = Path("/dev/vhost-net")


class HostNetwork(Closeable):
    """The host's side of a network interface of a guest.

    Attributes:
        mac: the guest's MAC address.
        address: an address for the guest; None where somebody else hands them out, or nobody.

    Args:
        text: what the user wants, see `NetworkSpecification.parse`.
        index: number of the interface.
        machine: the machine's name.

    Raises:
        NetworkSpecificationError: the text describes none.
        NetworkError: the kernel refuses, or this user may not.
        PasstError, DnsmasqError: a program is missing or does not start.
    """

    def __init__(self, text: str, index: int, machine: str) -> None:
        from pykvm.network.mac_address import mac_address
        from pykvm.network.specification import (
            NetworkKind,
            NetworkSpecification,
            NetworkSpecificationError,
        )

        wanted = NetworkSpecification.parse(text)
        machine = machine or _UNNAMED
        self.mac = wanted.mac or mac_address(machine, index)
        self.address: StaticAddress | None = None
        if wanted.queues > 1:
            raise NetworkSpecificationError(
                f"{wanted.queues} queues: a guest's interface has one pair", "leave out queues"
            )
        self._tap_or_user: Closeable | None = None
        with ExitStack() as stack:
            if wanted.kind is NetworkKind.USER:
                from pykvm.network.user_network import UserNetwork

                user = UserNetwork(
                    self.mac, forwards=wanted.forwards, host=wanted.host, mtu=wanted.mtu
                )
                self._tap_or_user = stack.enter_context(user)
                self.address = user.address
            elif wanted.kind is NetworkKind.TAP:
                from pykvm.network.addresses import DhcpServer, allocate
                from pykvm.network.tap import Tap

                tap = stack.enter_context(
                    Tap(
                        wanted.name,
                        mtu=wanted.mtu,
                        bridge=wanted.bridge,
                        address=wanted.address,
                    )
                )
                self._tap_or_user = tap
                port = tap.port
                if port is not None and port.ours and port.address is not None:
                    self.address = allocate(port, f"{machine} {index}")
                if port is not None and wanted.dhcp:
                    stack.enter_context(DhcpServer(port))
            self._resources = stack.pop_all()

    def device(self, memory: GuestMemory) -> VirtioDevice | None:
        """Return the guest's side; None where there is none.

        Raises:
            VhostError: vhost-net refuses the TAP.
        """
        from pykvm.devices.virtio.net import Net
        from pykvm.network.frame_stream import FrameStream
        from pykvm.network.tap import Tap

        other = self._tap_or_user
        if isinstance(other, Tap) and os.access(_VHOST_NET, os.R_OK | os.W_OK):
            from pykvm.devices.virtio.net_vhost import VhostNet

            return VhostNet(memory, other, self.mac)
        if isinstance(other, (Tap, FrameStream)):
            return Net(memory, other, self.mac)
        return None

    def close(self) -> None:
        """Remove what was made on the host. Harmless twice."""
        self._resources.close()


def configured_networks(config: MachineConfig) -> Iterator[HostNetwork]:
    """Yield the networks; each is the caller's before the next one is made.

    Raises:
        PykvmError: see `HostNetwork`.
    """
    for index, text in enumerate(config.networks):
        yield HostNetwork(text, index, config.name)


def configured_devices(
    config: MachineConfig, memory: GuestMemory, networks: Sequence[HostNetwork]
) -> Iterator[VirtioDevice]:
    """Yield the devices; each is the caller's before the next one is made.

    Raises:
        DiskError, ImageError: a disk cannot be used.
        VhostError: vhost-net refuses a TAP.
        ShareError, BackendError: a directory cannot be shared.
    """
    for disk in config.disks:
        yield _disk(disk, memory)
    for network in networks:
        if (device := network.device(memory)) is not None:
            yield device
    for share in config.shares:
        from pykvm.devices.virtio.fs import VirtioFs

        yield VirtioFs(share.tag, share.directory, memory, read_only=share.read_only)
    yield Entropy(memory)


def _disk(disk: Disk, memory: GuestMemory) -> VirtioDevice:
    from pykvm.devices.virtio.block import Block, DiskFile
    from pykvm.devices.virtio.storage_daemon import StorageDaemonDisk, image_format

    if image_format(disk.path) == "raw":
        return Block(memory, DiskFile(disk.path, read_only=disk.read_only))
    return StorageDaemonDisk(disk.path, memory, read_only=disk.read_only)
