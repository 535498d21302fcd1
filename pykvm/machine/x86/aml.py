"""ACPI Machine Language: the few terms that a machine's DSDT is made of.

Each function returns encoded bytes. Source: ACPI specification 6.5, chapters 20 (AML) and 6.4
(resource descriptors).
"""

import struct
from collections.abc import Iterable
from typing import Final

__all__ = [
    "ARG0",
    "buses",
    "device",
    "eisa_id",
    "fixed_memory",
    "if_equal",
    "integer",
    "interrupt",
    "memory",
    "method",
    "name",
    "notify",
    "package",
    "ports",
    "resources",
    "returns",
    "scope",
    "string",
]

ARG0: Final = b"\x68"
"""The first argument of a method."""

# Flags of an address space descriptor (6.4.3.5): both ends are fixed.
_FIXED = 0x0C


def name(path: str, value: bytes) -> bytes:
    """Return the term that gives an object a name: ``Name(path, value)``."""
    return b"\x08" + _path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Return terms below a name that exists."""
    return b"\x10" + _sized(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Return a device."""
    return b"\x5b\x82" + _sized(_path(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Return a serialized method of 0 to 7 arguments (20.2.5.2)."""
    return b"\x14" + _sized(_path(path) + bytes([arguments | 1 << 3]) + b"".join(terms))


def returns(value: bytes) -> bytes:
    """Return the term with which a method ends and gives a value."""
    return b"\xa4" + value


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """Return terms that are evaluated if two integers are equal."""
    return b"\xa0" + _sized(b"\x93" + left + right + b"".join(terms))


def notify(path: str, event: int) -> bytes:
    """Return the term that tells the driver of a device about an event."""
    return b"\x86" + _path(path) + integer(event)


def package(*elements: bytes) -> bytes:
    """Return a package of elements."""
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


def integer(value: int) -> bytes:
    """Return an integer of up to 64 bits in its shortest form."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """Return a string of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Return the number that stands for an identifier such as "PNP0501" (6.1.5)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    maker = letters[0] << 10 | letters[1] << 5 | letters[2]
    return integer(int.from_bytes(struct.pack(">HH", maker, int(text[3:], 16)), "little"))


def resources(*descriptors: bytes) -> bytes:
    """Return a resource template, for ``_CRS``."""
    content = b"".join(descriptors) + b"\x79\0"  # end tag, whose checksum 0 means none
    return b"\x11" + _sized(integer(len(content)) + content)


def ports(first: int, count: int) -> bytes:
    """Return the descriptor of a fixed range of I/O ports (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def interrupt(gsi: int, *, edge: bool = True) -> bytes:
    """Return the descriptor of an active-high interrupt (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0x01 | (0x02 if edge else 0), 1, gsi)


def fixed_memory(first: int, size: int) -> bytes:
    """Return the descriptor of a range of memory below 4 GiB, for one device (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, first, size)


def buses(first: int, count: int) -> bytes:
    """Return the descriptor of the bus numbers that a bridge passes on (6.4.3.5.3)."""
    fields = (0, first, first + count - 1, 0, count)
    return struct.pack("<BHBBB5H", 0x88, 13, 2, _FIXED, 0, *fields)


def memory(first: int, size: int) -> bytes:
    """Return the descriptor of memory that a bridge passes on, not prefetchable (6.4.3.5.1)."""
    fields = (0, first, first + size - 1, 0, size)
    return struct.pack("<BHBBB5Q", 0x8A, 43, 0, _FIXED, 1, *fields)


def _path(path: str) -> bytes:
    root, segments = path.startswith("\\"), list(filter(None, path.strip("\\").split(".")))
    encoded = b"".join(_segments(segments))
    prefix = {0: b"\0", 1: b"", 2: b"\x2e"}.get(len(segments), b"\x2f" + bytes([len(segments)]))
    return (b"\\" if root else b"") + prefix + encoded


def _segments(segments: Iterable[str]) -> Iterable[bytes]:
    for segment in segments:
        if not 1 <= len(segment) <= 4:
            raise ValueError(f"{segment!r} is no name segment")
        yield segment.ljust(4, "_").encode("ascii")


def _sized(content: bytes) -> bytes:
    """Return content with the length of both in front (20.2.4)."""
    if len(content) + 1 < 0x40:
        return bytes([len(content) + 1]) + content
    for extra in (1, 2, 3):
        length = len(content) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            head = bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little")
            return head + content
    raise ValueError(f"{len(content)} bytes in one term")
