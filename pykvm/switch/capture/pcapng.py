"""Wireshark's capture format, pcapng: the packets of all Ethernet interfaces in it.

A file is a row of blocks: a section header, interface descriptions, packets that refer to them, and
others that are skipped. See "PCAP Now Generic (pcapng) Capture File Format",
draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pykvm.switch.capture.errors import ForeignCaptureError
from pykvm.switch.capture.records import Record, check_link_type, check_record, damaged, truncated
from pykvm.switch.capture.source import Source

__all__ = ["SECTION_HEADER", "pcapng_records"]

SECTION_HEADER: Final = 0x0A0D0D0A.to_bytes(4, "little")  # the same in either byte order

_ORDER_MAGIC: Final = 0x1A2B3C4D
_INTERFACE, _OLD_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET = 1, 2, 3, 6
_SMALLEST_BLOCK: Final = 12
_SMALLEST_SECTION_HEADER: Final = 28

_OPTION_END: Final = 0
_PACKET_FLAGS: Final = 2
_TIME_RESOLUTION: Final = 9
_FCS_LENGTH: Final = 13
_TIME_OFFSET: Final = 14

_SECOND: Final = 1_000_000_000
_FCS_FLAGS_SHIFT: Final = 5  # bits 5 to 8 of a packet's flags: bytes, 0 when not known


@dataclass(frozen=True)
class _Interface:
    """`units` of time per second, `offset` in seconds; lengths in bytes, snapshot 0: no limit."""

    link_type: int
    snapshot: int
    fcs: int
    units: int
    offset: int


class _BlockError(Exception):
    """A block that says of itself what cannot be; the message completes "it ..."."""


def pcapng_records(source: Source) -> Iterator[Record]:
    """Yield the packets of a file that begins with a section header.

    Raises ForeignCaptureError, LinkTypeError, TruncatedCaptureError, DamagedCaptureError.
    """
    order = "<"
    interfaces: list[_Interface] = []
    data, at, number = source.data, 0, 1
    while at < len(data):
        if at + _SMALLEST_BLOCK > len(data):
            raise truncated(source, number, "the block")
        if data[at : at + 4] == SECTION_HEADER:
            order = _section_order(source, number, at)
            interfaces = []
        kind, size = struct.unpack_from(order + "II", data, at)
        if size < _SMALLEST_BLOCK or size % 4:
            raise damaged(source, number, f"is a block of {size} bytes")
        if at + size > len(data):
            raise truncated(source, number, "the block")
        if struct.unpack_from(order + "I", data, at + size - 4)[0] != size:
            raise damaged(source, number, f"is a block of {size} bytes that ends with another size")
        body = data[at + 8 : at + size - 4]
        try:
            if kind == _INTERFACE:
                interfaces.append(_interface(order, body))
            elif kind in (_OLD_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET):
                interface, record = _packet(source, order, kind, body, interfaces, number)
                check_link_type(source, interface.link_type)
                yield record
                number += 1
        except (_BlockError, struct.error) as error:
            how = str(error) if isinstance(error, _BlockError) else "is too short for its kind"
            raise damaged(source, number, how) from error
        at += size


def _section_order(source: Source, number: int, at: int) -> str:
    if at + _SMALLEST_SECTION_HEADER > len(source.data):
        raise truncated(source, number, "the section header")
    for order in "<>":
        magic, major = struct.unpack_from(order + "IH", source.data, at + 8)
        if magic == _ORDER_MAGIC:
            if major != 1:
                raise ForeignCaptureError(
                    f"{source.name} has pcapng version {major}, not 1",
                    f"convert it: `editcap -F pcap {source.operand} out.pcap`",
                )
            return order
    raise damaged(source, number, "is a section header of no byte order")


def _interface(order: str, body: bytes) -> _Interface:
    link_type, _, snapshot = struct.unpack_from(order + "HHI", body)
    options = _options(order, body[8:])
    resolution = options.get(_TIME_RESOLUTION, b"\x06")[:1] or b"\x06"
    base = 2 if resolution[0] & 0x80 else 10
    # Bits, says the draft; its own example and Wireshark mean bytes. No sequence has 8 bytes.
    fcs = options.get(_FCS_LENGTH, b"\0")[:1] or b"\0"
    offset = options.get(_TIME_OFFSET, b"")
    return _Interface(
        link_type=link_type,
        snapshot=snapshot,
        fcs=fcs[0] // 8 if fcs[0] >= 8 else fcs[0],
        units=base ** (resolution[0] & 0x7F),
        offset=struct.unpack(order + "q", offset)[0] if len(offset) == 8 else 0,
    )


def _packet(
    source: Source,
    order: str,
    kind: int,
    body: bytes,
    interfaces: list[_Interface],
    number: int,
) -> tuple[_Interface, Record]:
    if kind == _SIMPLE_PACKET:
        (original,) = struct.unpack_from(order + "I", body)
        index, time, start, captured = 0, 0, 4, original
        if interfaces and interfaces[0].snapshot:
            captured = min(original, interfaces[0].snapshot)
    else:
        fields = "IIIII" if kind == _ENHANCED_PACKET else "HxxIIII"
        index, high, low, captured, original = struct.unpack_from(order + fields, body)
        time, start = high << 32 | low, 20
    if index >= len(interfaces):
        raise _BlockError(f"belongs to interface {index}, of which there is no description")
    check_record(source, number, captured, original)
    if start + captured > len(body):
        raise _BlockError(f"claims to hold {captured} bytes, in a block with room for less")
    interface = interfaces[index]
    fcs = interface.fcs
    if kind == _ENHANCED_PACKET:
        flags = _options(order, body[start + captured + -captured % 4 :]).get(_PACKET_FLAGS, b"")
        if len(flags) == 4:
            fcs = struct.unpack(order + "I", flags)[0] >> _FCS_FLAGS_SHIFT & 15 or fcs
    time_ns = interface.offset * _SECOND + time * _SECOND // interface.units
    return interface, Record(number, time_ns, body[start : start + captured], original, fcs)


def _options(order: str, data: bytes) -> dict[int, bytes]:
    """The last value of each option, in what may end anywhere."""
    options: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        code, size = struct.unpack_from(order + "HH", data, at)
        if code == _OPTION_END:
            break
        options[code] = data[at + 4 : at + 4 + size]
        at += 4 + size + -size % 4
    return options
