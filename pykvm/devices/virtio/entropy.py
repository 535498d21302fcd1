"""A virtio entropy device: a guest gets random numbers of the host's kernel.

Source: VIRTIO 1.2, 5.4; getrandom(2).
"""

from __future__ import annotations

from pykvm.devices.virtio._virtio import lib
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.loop import NATIVE_FEATURES, NativeDevice
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Entropy"]


class Entropy(NativeDevice):
    """A source of random numbers, at most 64 KiB for each request."""

    type = DeviceType.ENTROPY
    queue_sizes = (8,)
    features = NATIVE_FEATURES
    stateless = True

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory, "entropy", lib.entropy_new(), lib.entropy_free)
