"""Features of virtio network devices, and what they make of a TAP's offloads.

Source: VIRTIO 1.2, 5.1.3 and 5.1.4.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import Final

from pykvm.network.tap import Offload, Tap

__all__ = ["NetFeature", "net_config", "offloads_of", "tap_features"]

_LINK_UP: Final = 1


class NetFeature(IntFlag):
    """Feature bits (5.1.3). GUEST: of frames to the guest; HOST: of frames from it."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16


_OFFLOADS: Final = {
    NetFeature.GUEST_CSUM: Offload.CSUM,
    NetFeature.GUEST_TSO4: Offload.TSO4,
    NetFeature.GUEST_TSO6: Offload.TSO6,
    NetFeature.GUEST_ECN: Offload.TSO_ECN,
}
_OF_TAPS: Final = (
    NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6 | NetFeature.HOST_ECN
)


def tap_features(tap: Tap) -> int:
    """Return the features that a device has of its TAP."""
    features = int(_OF_TAPS)
    for feature, offload in _OFFLOADS.items():
        if offload & tap.offloads:
            features |= int(feature)
    return features


def offloads_of(accepted: int) -> Offload:
    """Return what a TAP may leave undone for a driver that has accepted these features."""
    offloads = Offload(0)
    for feature, offload in _OFFLOADS.items():
        if accepted & feature:
            offloads |= offload
    # What depends on a feature that was refused is refused, too (5.1.3.1).
    if not offloads & Offload.CSUM:
        return Offload(0)
    if not offloads & (Offload.TSO4 | Offload.TSO6):
        offloads &= Offload.CSUM
    return offloads


def net_config(mac: str, *, link: bool, mtu: int) -> bytes:
    """Return struct virtio_net_config (5.1.4) up to the MTU, with one pair of queues."""
    address = bytes.fromhex(mac.replace(":", ""))
    return address + struct.pack("<HHH", _LINK_UP if link else 0, 1, mtu)
