"""Packet records, which both capture formats have, and what is wrong with some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pykvm.switch.capture.errors import (
    DamagedCaptureError,
    LinkTypeError,
    TruncatedCaptureError,
)
from pykvm.switch.capture.source import Source

__all__ = ["Record", "check_link_type", "check_record", "damaged", "truncated"]

ETHERNET: Final = 1
MAX_CAPTURED: Final = 262144
"""Largest record in bytes, libpcap's MAXIMUM_SNAPLEN."""

_ONE_INTERFACE: Final = "capture on one Ethernet interface: `tcpdump -i eth0 -w FILE`"

# https://www.tcpdump.org/linktypes.html
_LOOPBACK: Final = "the packets of a loopback or tunnel interface, which have no Ethernet header"
_RAW_IP: Final = "bare IP packets, as a tunnel or a mobile network has them"
_COOKED: Final = "packets of all interfaces (`any`), without their whole Ethernet headers"
_WIRELESS: Final = "Wi-Fi frames of monitor mode"
_LINK_TYPES: Final = {
    **dict.fromkeys((0, 108), _LOOPBACK),
    **dict.fromkeys((12, 14, 101, 228, 229), _RAW_IP),
    **dict.fromkeys((113, 276), _COOKED),
    **dict.fromkeys((105, 119, 127, 163, 192), _WIRELESS),
    **dict.fromkeys((9, 50, 51, 166, 204), "PPP frames"),
    **dict.fromkeys((189, 220, 249), "USB transfers"),
    **dict.fromkeys((187, 201, 251, 256), "Bluetooth packets"),
    **dict.fromkeys((227,), "CAN frames"),
    **dict.fromkeys((239, 253), "messages of netlink or of a packet filter's log"),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One packet.

    number: from 1, of all packets in the file. time_ns: since 1970. data: as many bytes as were
    captured. original: length on the wire. fcs: bytes of it at the end that are its checksum.
    """

    number: int
    time_ns: int
    data: bytes
    original: int
    fcs: int


def check_link_type(source: Source, link_type: int) -> None:
    """Raise LinkTypeError for anything but Ethernet."""
    if link_type == ETHERNET:
        return
    what = _LINK_TYPES.get(link_type, "no Ethernet frames")
    raise LinkTypeError(f"{source.name} holds {what} (link type {link_type})", _ONE_INTERFACE)


def check_record(source: Source, number: int, captured: int, original: int) -> None:
    """Raise DamagedCaptureError for lengths that no writer puts into a record."""
    if captured > MAX_CAPTURED:
        raise damaged(source, number, f"claims to hold {captured} bytes")
    if captured > original:
        raise damaged(source, number, f"claims to hold {captured} of {original} bytes")


def damaged(source: Source, number: int, how: str) -> DamagedCaptureError:
    """The error for a record that makes no sense; those in front of it can be saved."""
    return DamagedCaptureError(
        f"{source.name}: record {number} is damaged: it {how}",
        f"keep the {number - 1} in front of it: "
        f"`tcpdump -r {source.operand} -w good.pcap -c {number - 1}`"
        if number > 1
        else "copy or capture it again",
    )


def truncated(source: Source, number: int, what: str) -> TruncatedCaptureError:
    """The error for a file that ends inside `what` of record `number`."""
    return TruncatedCaptureError(
        f"{source.name} ends inside {what} of frame {number}: the capture or a copy was cut short",
        f"keep the {number - 1} whole ones: `tcpdump -r {source.operand} -w whole.pcap`"
        if number > 1
        else "copy or capture it again",
    )
