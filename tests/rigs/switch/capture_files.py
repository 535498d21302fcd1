"""Captures made by hand, byte for byte, in either format and byte order."""

from __future__ import annotations

import struct

__all__ = ["A", "B", "C", "block", "enhanced", "interface", "option", "packet", "pcap", "section"]

A, B, C = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))
"""Addresses of three stations."""


def pcap(
    packets: bytes = b"",
    *,
    order: str = "<",
    magic: int = 0xA1B2C3D4,
    link: int = 1,
    version: tuple[int, int] = (2, 4),
) -> bytes:
    """Return a whole file."""
    return struct.pack(order + "IHHiIII", magic, *version, 0, 0, 65535, link) + packets


def packet(
    data: bytes, *, order: str = "<", original: int | None = None, captured: int | None = None
) -> bytes:
    """Return one record, 7 units after 1700000000; its lengths may differ from that of `data`."""
    sizes = (
        len(data) if captured is None else captured,
        len(data) if original is None else original,
    )
    return struct.pack(order + "IIII", 1_700_000_000, 7, *sizes) + data


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """Return one block of pcapng."""
    size = struct.pack(order + "I", 12 + len(body) + -len(body) % 4)
    return struct.pack(order + "I", kind) + size + body + bytes(-len(body) % 4) + size


def option(code: int, value: bytes, order: str = "<") -> bytes:
    """Return one option of a block."""
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<", version: int = 1) -> bytes:
    """Return a section header."""
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, version, 0, -1), order)


def interface(link: int = 1, options: bytes = b"", *, snapshot: int = 0, order: str = "<") -> bytes:
    """Return an interface description."""
    return block(1, struct.pack(order + "HHI", link, 0, snapshot) + options, order)


def enhanced(
    data: bytes,
    options: bytes = b"",
    *,
    order: str = "<",
    index: int = 0,
    time: int = 7,
    original: int | None = None,
    captured: int | None = None,
) -> bytes:
    """Return an enhanced packet block."""
    sizes = (
        len(data) if captured is None else captured,
        len(data) if original is None else original,
    )
    head = struct.pack(order + "IIIII", index, time >> 32, time & 0xFFFF_FFFF, *sizes)
    return block(6, head + data + bytes(-len(data) % 4) + options, order)
