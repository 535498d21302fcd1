"""Packets of GDB's remote protocol: framing, checksum, escapes.

Source: "Debugging with GDB", appendix E.1 (Overview). Replies are not run-length encoded: GDB does
not require it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pykvm.errors import PykvmError

__all__ = ["PACKET_SIZE", "Packet", "PacketReader", "PacketTooLongError", "Sign", "encode"]

PACKET_SIZE: Final = 0x4000
"""Most bytes of a packet's contents, as they are on the wire."""

_ESCAPED: Final = re.compile(rb"[#$*}]")
_ESCAPE: Final = 0x7D
_FLIP: Final = 0x20


class PacketTooLongError(PykvmError):
    """A packet that no debugger sends, which was told `PACKET_SIZE`."""


class Sign(Enum):
    """Signals of a client between packets, and what takes a packet's place if it is damaged."""

    ACKNOWLEDGED = "+"
    REPEAT = "-"
    INTERRUPT = "ctrl-c"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet's contents, without escapes."""

    data: bytes


def encode(data: bytes) -> bytes:
    """Return the packet with these contents, as it goes on the wire."""
    body = _ESCAPED.sub(lambda found: bytes((_ESCAPE, found[0][0] ^ _FLIP)), data)
    return b"$%s#%02x" % (body, sum(body) & 0xFF)


def _decoded(body: bytes) -> bytes:
    head, *tail = body.split(bytes((_ESCAPE,)))
    # An escape at the end escapes nothing, and is left out.
    return head + b"".join(bytes((part[0] ^ _FLIP,)) + part[1:] for part in tail if part)


class PacketReader:
    """Takes a stream apart. Bytes between packets that mean nothing are ignored, as GDB does."""

    def __init__(self) -> None:
        self._body: bytearray | None = None  # None between packets
        self._sum: bytearray | None = None  # None before '#'

    def feed(self, data: bytes) -> list[Packet | Sign]:
        """Return what these bytes complete, in order.

        Raises:
            PacketTooLongError: a packet has more than `PACKET_SIZE` bytes.
        """
        found: list[Packet | Sign] = []
        for byte in data:
            if byte == 0x24:  # '$' begins a packet even inside another, whose end was lost
                self._body, self._sum = bytearray(), None
            elif self._body is None:
                if (sign := _SIGNS.get(byte)) is not None:
                    found.append(sign)
            elif self._sum is not None:
                self._sum.append(byte)
                if len(self._sum) == 2:
                    found.append(self._finished(bytes(self._body), bytes(self._sum)))
                    self._body = self._sum = None
            elif byte == 0x23:  # '#'
                self._sum = bytearray()
            elif len(self._body) == PACKET_SIZE:
                raise PacketTooLongError(
                    f"a packet of more than {PACKET_SIZE} bytes", "connect gdb, and nothing else"
                )
            else:
                self._body.append(byte)
        return found

    @staticmethod
    def _finished(body: bytes, digits: bytes) -> Packet | Sign:
        if not re.fullmatch(rb"[0-9a-fA-F]{2}", digits) or int(digits, 16) != sum(body) & 0xFF:
            return Sign.DAMAGED
        return Packet(_decoded(body))


_SIGNS: Final = {0x2B: Sign.ACKNOWLEDGED, 0x2D: Sign.REPEAT, 0x03: Sign.INTERRUPT}
