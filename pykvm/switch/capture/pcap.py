"""The classic capture format, pcap: records read, frames written.

A file header, then a header and data for each packet, in the byte order of whoever wrote the file.
See "PCAP Capture File Format", draft-ietf-opsawg-pcap, and pcap-savefile(5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pykvm.switch.capture.errors import ForeignCaptureError, TruncatedCaptureError
from pykvm.switch.capture.frames import Frame
from pykvm.switch.capture.records import (
    ETHERNET,
    MAX_CAPTURED,
    Record,
    check_link_type,
    check_record,
    truncated,
)
from pykvm.switch.capture.source import Source

__all__ = ["byte_order", "encode_capture", "pcap_records", "write_capture"]

_MICROSECONDS: Final = 0xA1B2C3D4
_NANOSECONDS: Final = 0xA1B23C4D
_FILE: Final = "IHHiIII"  # magic, version (two), two unused, snapshot length, link type and FCS
_PACKET: Final = "IIII"  # seconds, fraction, captured and original length

# In the last field of the file header: the link type, whether the length of the frame check
# sequence is known, and that length in units of 16 bits.
_LINK_TYPE_MASK: Final = 0xFFFF
_FCS_PRESENT: Final = 1 << 26
_FCS_SHIFT: Final = 28

_SECOND: Final = 1_000_000_000
_LAST_SECOND: Final = 0xFFFF_FFFF


def byte_order(data: bytes) -> tuple[str, int] | None:
    """Struct prefix and nanoseconds per unit of a fraction; None for what is no pcap file."""
    for order in "<>":
        magic = int.from_bytes(data[:4], "little" if order == "<" else "big")
        if magic in (_MICROSECONDS, _NANOSECONDS):
            return order, 1000 if magic == _MICROSECONDS else 1
    return None


def pcap_records(source: Source, order: str, unit: int) -> Iterator[Record]:
    """Yield the packets of a file whose `byte_order` is known.

    Raises ForeignCaptureError, LinkTypeError, TruncatedCaptureError, DamagedCaptureError.
    """
    data = source.data
    header, packet = struct.Struct(order + _FILE), struct.Struct(order + _PACKET)
    if len(data) < header.size:
        raise TruncatedCaptureError(
            f"{source.name} ends inside its header", "copy or capture it again"
        )
    _, major, minor, _, _, _, link = header.unpack_from(data)
    if (major, minor) != (2, 4):
        raise ForeignCaptureError(
            f"{source.name} has pcap version {major}.{minor}, not 2.4",
            f"convert it: `editcap -F pcap {source.operand} out.pcap`",
        )
    check_link_type(source, link & _LINK_TYPE_MASK)
    fcs = 2 * (link >> _FCS_SHIFT) if link & _FCS_PRESENT else 0
    at, number = header.size, 0
    while at < len(data):
        number += 1
        if at + packet.size > len(data):
            raise truncated(source, number, "the header")
        seconds, fraction, captured, original = packet.unpack_from(data, at)
        check_record(source, number, captured, original)
        at += packet.size
        if at + captured > len(data):
            raise truncated(source, number, "the bytes")
        time_ns = seconds * _SECOND + fraction * unit
        yield Record(number, time_ns, data[at : at + captured], original, fcs)
        at += captured


def encode_capture(frames: Iterable[Frame], *, nanoseconds: bool = False) -> bytes:
    """Return a little-endian pcap file of Ethernet frames.

    The format counts seconds from 1970 to 2106; a time before or after becomes the nearest.
    """
    magic, unit = (_NANOSECONDS, 1) if nanoseconds else (_MICROSECONDS, 1000)
    parts = [struct.pack("<" + _FILE, magic, 2, 4, 0, 0, MAX_CAPTURED, ETHERNET)]
    for frame in frames:
        seconds, rest = divmod(frame.time_ns, _SECOND)
        seconds = min(max(seconds, 0), _LAST_SECOND)
        size = len(frame.data)
        parts += [struct.pack("<" + _PACKET, seconds, rest // unit, size, size), frame.data]
    return b"".join(parts)


def write_capture(path: str | Path, frames: Iterable[Frame], *, nanoseconds: bool = False) -> None:
    """Write what `encode_capture` returns, replacing `path`."""
    Path(path).write_bytes(encode_capture(frames, nanoseconds=nanoseconds))
