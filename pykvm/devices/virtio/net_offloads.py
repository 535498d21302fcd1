"""What a network device and a TAP leave to each other: checksums, and segments of TCP.

Source: VIRTIO 1.2, 5.1.3 and 5.1.4; Linux Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import fcntl
import struct
from typing import Any, Final

from pykvm.devices.virtio._vhost import ffi, lib
from pykvm.errors import PykvmError

__all__ = [
    "HEADER_SIZE",
    "NetError",
    "check_mac",
    "features_of",
    "net_config",
    "offloads_of",
    "prepare_tap",
]


class NetError(PykvmError, ValueError):
    """A network device that cannot be."""


def _mask(*names: str) -> int:
    return sum(1 << getattr(lib, f"VIRTIO_NET_F_{name}") for name in names)


HEADER_SIZE: Final[int] = ffi.sizeof("struct virtio_net_hdr_mrg_rxbuf")
"""Bytes of virtio_net_hdr before each frame, 12 since virtio 1.0 (5.1.6)."""

_FROM_DRIVER: Final = _mask("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN")
"""What a TAP takes from a driver whenever frames have a header."""

_TO_DRIVER: Final = (
    (lib.TUN_F_CSUM, _mask("GUEST_CSUM")),
    (lib.TUN_F_TSO4, _mask("GUEST_TSO4")),
    (lib.TUN_F_TSO6, _mask("GUEST_TSO6")),
    (lib.TUN_F_TSO_ECN, _mask("GUEST_ECN")),
)
"""TUN_F_ bits, and the features of a driver that takes such frames."""


def features_of(offloads: int) -> int:
    """Return the feature bits to offer with a TAP that has these TUN_F_ bits."""
    return _FROM_DRIVER | sum(feature for bit, feature in _TO_DRIVER if offloads & bit)


def offloads_of(features: int) -> int:
    """Return the TUN_F_ bits for a driver that has accepted these features.

    A TAP takes none of the others without checksums, and ECN only with segments.
    """
    bits: int = sum(bit for bit, feature in _TO_DRIVER if features & feature)
    if not bits & lib.TUN_F_CSUM:
        return 0
    return bits if bits & (lib.TUN_F_TSO4 | lib.TUN_F_TSO6) else bits & ~lib.TUN_F_TSO_ECN


def prepare_tap(tap: int) -> int:
    """Give the frames of a TAP `HEADER_SIZE`; return the TUN_F_ bits that it can have.

    Raises:
        NetError: the descriptor is no TAP, or its frames have no header (IFF_VNET_HDR).
    """
    try:
        answer = fcntl.ioctl(tap, lib.TUNGETIFF, bytes(40))
        flags = struct.unpack_from("16xH", answer)[0]
        if not flags & lib.IFF_TAP or not flags & lib.IFF_VNET_HDR or not flags & lib.IFF_NO_PI:
            raise NetError(
                f"descriptor {tap} is a tun device with flags {flags:#x}",
                "make it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
            )
        fcntl.ioctl(tap, lib.TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
        fcntl.ioctl(tap, lib.TUNSETVNETLE, struct.pack("i", 1))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NetError(f"descriptor {tap} is no TAP ({reason})", "open /dev/net/tun") from error
    everything = sum(bit for bit, _ in _TO_DRIVER)
    found: int = next(bits for bits in (everything, lib.TUN_F_CSUM, 0) if _takes(tap, bits))
    return found


def _takes(tap: int, offloads: int) -> bool:
    try:
        fcntl.ioctl(tap, lib.TUNSETOFFLOAD, offloads)
    except OSError:
        return not offloads
    fcntl.ioctl(tap, lib.TUNSETOFFLOAD, 0)  # until a driver says what it takes
    return True


def check_mac(mac: bytes) -> bytes:
    """Return a MAC address that a station can have.

    Raises:
        NetError: it cannot.
    """
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise NetError(f"MAC address {mac.hex(':')}", "use six bytes, the first of them even")
    return mac


def net_config(mac: bytes, mtu: int = 0) -> bytes:
    """Return struct virtio_net_config (5.1.4) to the MTU: a link that is up, one pair of queues."""
    config: Any = ffi.new("struct virtio_net_config *")
    config.mac = list(mac)
    config.status = lib.VIRTIO_NET_S_LINK_UP
    config.max_virtqueue_pairs = 1
    config.mtu = mtu
    size = ffi.offsetof("struct virtio_net_config", "mtu") + 2
    return bytes(ffi.buffer(config)[0:size])
