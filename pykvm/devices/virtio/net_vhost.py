"""A network device whose frames go between guest and TAP inside the kernel (vhost-net).

Source: VIRTIO 1.2, 5.1; Linux drivers/vhost/net.c.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm.devices.virtio._vhost import lib
from pykvm.devices.virtio.device import DeviceType, Feature, Ring
from pykvm.devices.virtio.net_offloads import (
    NetError,
    check_mac,
    features_of,
    net_config,
    offloads_of,
    prepare_tap,
)
from pykvm.devices.virtio.vhost_kernel import VhostError, VhostKernel
from pykvm.devices.virtio.vhost_kernel_device import VhostKernelDevice
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["VHOST_NET", "VhostNet"]

VHOST_NET: Final = Path("/dev/vhost-net")

_QUEUE_SIZE: Final = 256
_QUEUES: Final = 2  # received frames, frames to send
_STOPPED: Final = -1
_MTUS: Final = range(68, 1 << 16)
"""RFC 791 and 5.1.4.1."""

_OF_THE_KERNEL: Final[int] = (
    Feature.INDIRECT_DESC | Feature.EVENT_IDX | 1 << lib.VIRTIO_NET_F_MRG_RXBUF
)
"""Features that are vhost-net's and not the TAP's."""


class VhostNet(VhostKernelDevice):
    """A network device with one pair of queues.

    Args:
        tap: descriptor of a TAP whose frames have a virtio_net_hdr; the device takes a copy.
        mac: the guest's address.
        memory: the guest's.
        mtu: bytes that the guest may put into a frame; 0 leaves it at what it believes.
        path: the device.

    Raises:
        NetError: the descriptor is no such TAP, or the address or MTU cannot be.
        VhostError: there is no vhost-net, or this user may not use it.
    """

    stateless = True

    def __init__(
        self, tap: int, mac: bytes, memory: GuestMemory, *, mtu: int = 0, path: Path = VHOST_NET
    ) -> None:
        check_mac(mac)
        if mtu and mtu not in _MTUS:
            raise NetError(f"an MTU of {mtu}", f"use {_MTUS.start} to {_MTUS.stop - 1}")
        features = features_of(prepare_tap(tap)) | 1 << lib.VIRTIO_NET_F_MAC
        features |= 1 << lib.VIRTIO_NET_F_STATUS
        features |= 1 << lib.VIRTIO_NET_F_MTU if mtu else 0
        vhost = VhostKernel(path, "vhost_net")
        self._config = net_config(mac, mtu)
        self._tap = fcntl.fcntl(tap, fcntl.F_DUPFD_CLOEXEC, 0)
        super().__init__(
            DeviceType.NET,
            vhost,
            "vhost-net",
            memory,
            queue_sizes=[_QUEUE_SIZE] * _QUEUES,
            features=features | vhost.features & _OF_THE_KERNEL,
            served=_QUEUES,
            broken={self._tap: "the TAP of a network device is gone"},
        )

    def config(self) -> bytes:
        """Return the address, the link's state and the MTU (5.1.4)."""
        return self._config

    def _run(self, rings: Sequence[Ring]) -> None:
        for ring in rings:
            self._vhost.set_backend(ring.index, self._tap)

    def _halt(self, rings: Sequence[Ring]) -> None:
        for ring in rings:
            self._vhost.set_backend(ring.index, _STOPPED)

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Hand the rings to the kernel, and let the TAP send what the driver takes.

        Raises:
            RingError: a ring is not in guest memory.
            VhostError: the kernel refuses something.
            ForkedProcessError: the device works for the parent process.
        """
        self._vhost.require_own("start of a network device")
        try:
            fcntl.ioctl(self._tap, lib.TUNSETOFFLOAD, offloads_of(features))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise VhostError(
                f"the TAP of a network device refuses its offloads ({reason})",
                "see whether it is still there",
                errno=error.errno,
            ) from error
        super().start(features, rings)

    def close(self) -> None:
        """Close the handle and the copy of the TAP's descriptor. Harmless twice."""
        super().close()
        tap, self._tap = self._tap, -1
        if tap >= 0:
            os.close(tap)
