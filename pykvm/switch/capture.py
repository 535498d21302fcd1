"""Packet captures: the classic pcap format of Ethernet frames, read strictly and written.

Format: the global header has magic, version 2.4, snapshot length and link type; each packet has
seconds, a fraction (microseconds or nanoseconds, as the magic says), captured and original
length. See "PCAP Capture File Format", draft-ietf-opsawg-pcap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = [
    "CaptureError",
    "EmptyCaptureError",
    "ForeignCaptureError",
    "Frame",
    "FrameSizeError",
    "LinkTypeError",
    "TruncatedCaptureError",
    "UnreadableCaptureError",
    "read_capture",
    "split_capture",
    "write_capture",
]

_MICROSECONDS = 0xA1B2C3D4
_NANOSECONDS = 0xA1B23C4D
_PCAPNG = 0x0A0D0D0A
_ETHERNET = 1
_SNAPSHOT = 262144
_GLOBAL = struct.Struct("<IHHiIII")
_PACKET = struct.Struct("<IIII")
_MIN_FRAME = 14
_FRAME_LIMIT = 1514


class CaptureError(PykvmError):
    """A capture that cannot be used; the subclasses say why."""


class UnreadableCaptureError(CaptureError):
    """A file that the system does not let us read."""


class ForeignCaptureError(CaptureError):
    """Not a classic pcap file."""


class LinkTypeError(CaptureError):
    """A pcap file of something other than Ethernet."""


class TruncatedCaptureError(CaptureError):
    """A file that ends inside a header or a frame, or frames cut while capturing."""


class FrameSizeError(CaptureError):
    """A frame shorter than an Ethernet header or longer than the port's limit."""


class EmptyCaptureError(CaptureError):
    """A capture without frames, or without a second station."""


@dataclass(frozen=True)
class Frame:
    """One captured frame, without checksum; `time_ns` counts from 1970."""

    time_ns: int
    data: bytes

    @property
    def destination(self) -> bytes:
        """Six octets."""
        return self.data[:6]

    @property
    def source(self) -> bytes:
        """Six octets."""
        return self.data[6:12]


def _byte_order(path: Path, data: bytes) -> tuple[str, int]:
    """Struct prefix and nanoseconds per unit of the fraction."""
    for order in "<>":
        (magic,) = struct.unpack_from(order + "I", data)
        if magic == _MICROSECONDS:
            return order, 1000
        if magic == _NANOSECONDS:
            return order, 1
    if struct.unpack_from("<I", data)[0] == _PCAPNG:
        raise ForeignCaptureError(
            f"{path} is pcapng: convert it with `editcap -F pcap {path} out.pcap`"
        )
    raise ForeignCaptureError(
        f"{path} is no pcap file: give one written by `tcpdump -w` or `dumpcap -P`"
    )


def _check_frame(path: Path, number: int, captured: int, original: int, frame_limit: int) -> None:
    if not _MIN_FRAME <= original <= frame_limit:
        raise FrameSizeError(
            f"{path}: frame {number} has {original} bytes, the switch takes {_MIN_FRAME} to "
            f"{frame_limit}: filter it out, or turn segmentation offload off and capture again"
        )
    if captured != original:
        raise TruncatedCaptureError(
            f"{path}: frame {number} has {captured} of {original} bytes: "
            "capture again with `tcpdump -s 0`"
        )


def read_capture(path: str | Path, frame_limit: int = _FRAME_LIMIT) -> list[Frame]:
    """All frames of a classic pcap file, either byte order, micro- or nanoseconds.

    Every frame has 14 to `frame_limit` bytes, and all bytes that were on the wire. Raises a
    subclass of CaptureError otherwise, which names the file and the frame (counted from 1).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableCaptureError(
            f"cannot read {path}: {error.strerror}: name a pcap file"
        ) from error
    if len(data) < 4:
        raise ForeignCaptureError(
            f"{path} has {len(data)} bytes and is no pcap file: name one written by `tcpdump -w`"
        )
    order, unit = _byte_order(path, data)
    if len(data) < _GLOBAL.size:
        raise TruncatedCaptureError(f"{path} ends inside its header: copy or capture it again")
    _, major, minor, _, _, _, link = struct.unpack_from(order + _GLOBAL.format[1:], data)
    if (major, minor) != (2, 4):
        raise ForeignCaptureError(
            f"{path} has pcap version {major}.{minor}, not 2.4: convert it with `editcap -F pcap`"
        )
    if link != _ETHERNET:
        raise LinkTypeError(
            f"{path} has link type {link}, not {_ETHERNET} (Ethernet): "
            "capture on an Ethernet interface, not on `any`"
        )
    frames: list[Frame] = []
    offset = _GLOBAL.size
    while offset < len(data):
        number = len(frames) + 1
        if offset + _PACKET.size > len(data):
            raise TruncatedCaptureError(
                f"{path} ends inside the header of frame {number}: copy or capture it again"
            )
        seconds, fraction, captured, original = struct.unpack_from(
            order + _PACKET.format[1:], data, offset
        )
        _check_frame(path, number, captured, original, frame_limit)
        offset += _PACKET.size
        if offset + captured > len(data):
            raise TruncatedCaptureError(
                f"{path} ends inside frame {number}: copy or capture it again"
            )
        frames.append(
            Frame(seconds * 1_000_000_000 + fraction * unit, data[offset : offset + captured])
        )
        offset += captured
    if not frames:
        raise EmptyCaptureError(f"{path} holds no frames: capture some traffic first")
    return frames


def write_capture(path: str | Path, frames: Iterable[Frame], *, nanoseconds: bool = False) -> None:
    """Write a little-endian classic pcap file of Ethernet frames, replacing `path`."""
    magic, unit = (_NANOSECONDS, 1) if nanoseconds else (_MICROSECONDS, 1000)
    parts = [_GLOBAL.pack(magic, 2, 4, 0, 0, _SNAPSHOT, _ETHERNET)]
    for frame in frames:
        seconds, rest = divmod(frame.time_ns, 1_000_000_000)
        parts.append(_PACKET.pack(seconds, rest // unit, len(frame.data), len(frame.data)))
        parts.append(frame.data)
    Path(path).write_bytes(b"".join(parts))


def split_capture(frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
    """The frames that each of two guests sends, in order.

    Guest 0 is the station that sent the first frame; guest 1 is all the others. Raises
    EmptyCaptureError when there is nobody else, as then nothing would go the other way.
    """
    if not frames:
        raise EmptyCaptureError("there are no frames to split: read a capture that holds some")
    first = [frame for frame in frames if frame.source == frames[0].source]
    others = [frame for frame in frames if frame.source != frames[0].source]
    if not others:
        raise EmptyCaptureError(
            "all frames come from one station: capture both directions of a conversation"
        )
    return first, others
