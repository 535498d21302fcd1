"""A network device whose frames go between guest and TAP inside the kernel (vhost-net).

Source: VIRTIO 1.2, 5.1; Linux drivers/vhost/net.c.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pykvm.devices.virtio.device import DeviceType, Feature, Ring
from pykvm.devices.virtio.net_features import NetFeature, net_config, offloads_of, tap_features
from pykvm.devices.virtio.vhost_kernel import VhostError, VhostKernel
from pykvm.devices.virtio.vhost_kernel_device import VhostKernelDevice
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.tap import Tap

__all__ = ["VHOST_NET", "VhostNet"]

VHOST_NET: Final = Path("/dev/vhost-net")

_QUEUE_SIZE: Final = 256
_QUEUES: Final = 2  # received frames, frames to send
_STOPPED: Final = -1

_OF_THE_KERNEL: Final = Feature.INDIRECT_DESC | Feature.EVENT_IDX | NetFeature.MRG_RXBUF
"""Features that are vhost-net's and not the TAP's."""

_OF_ALL: Final = NetFeature.MTU | NetFeature.MAC | NetFeature.STATUS


class VhostNet(VhostKernelDevice):
    """A network interface of a guest, as `pykvm.devices.virtio.net.Net` is one.

    Attributes:
        link: whether the TAP is there.
        on_link_lost: called with a reason, from any thread, when the TAP has gone; the guest sees
            an interface without a link, to which the kernel gives nothing back that it sends.

    Args:
        memory: the guest's.
        tap: the host's side; closed with the device.
        mac: the guest's MAC address.
        path: the device.

    Raises:
        VhostError: there is no vhost-net, or this user may not use it; the TAP stays the caller's.
    """

    stateless = True
    on_link_lost: Callable[[str], None]

    def __init__(self, memory: GuestMemory, tap: Tap, mac: str, *, path: Path = VHOST_NET) -> None:
        vhost = VhostKernel(path, "vhost_net")
        self.link = True
        self.on_link_lost = lambda reason: None
        self._tap = tap
        self._mac = mac
        super().__init__(
            DeviceType.NET,
            vhost,
            "vhost-net",
            memory,
            queue_sizes=[_QUEUE_SIZE] * _QUEUES,
            features=int(_OF_ALL) | tap_features(tap) | vhost.features & int(_OF_THE_KERNEL),
            served=_QUEUES,
            broken={tap.descriptors[0]: self._lost},
        )

    def config(self) -> bytes:
        """Return struct virtio_net_config (5.1.4) up to the MTU."""
        return net_config(self._mac, link=self.link, mtu=self._tap.mtu)

    def _run(self, rings: Sequence[Ring]) -> None:
        try:
            for ring in rings if self.link else ():
                self._vhost.set_backend(ring.index, self._tap.descriptors[0])
        except VhostError:
            if not self._is_tap_gone():
                raise
            self._lost()

    def _halt(self, rings: Sequence[Ring]) -> None:
        for ring in rings:
            self._vhost.set_backend(ring.index, _STOPPED)

    def _ring_failed(self) -> None:
        # What the kernel cannot hand to a TAP that is gone is an error of the ring to it.
        if self._is_tap_gone():
            self._lost()
        else:
            super()._ring_failed()

    def _is_tap_gone(self) -> bool:
        tap = select.poll()
        tap.register(self._tap.descriptors[0], 0)
        return bool(tap.poll(0))

    def _lost(self) -> None:
        if not self.link:
            return
        self.link = False
        self.on_config()
        self.on_link_lost(f"{self._tap.name}: the TAP is gone")

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Hand the rings to the kernel, and let the TAP send what the driver takes.

        Raises:
            RingAddressError: a ring is not in guest memory.
            VhostError, NetworkError: the kernel refuses something.
            ForkedProcessError: the device works for the parent process.
        """
        if self.link:
            self._tap.set_offloads(offloads_of(features))
        super().start(features, rings)

    def close(self) -> None:
        """Close the handle and the TAP. Harmless twice."""
        super().close()
        self._tap.close()
