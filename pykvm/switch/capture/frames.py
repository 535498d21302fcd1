"""Ethernet frames out of packet records, whole and without checksums."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Final

from pykvm.switch.capture.errors import (
    CutFrameError,
    FrameSizeError,
    LoopbackCaptureError,
)
from pykvm.switch.capture.records import Record
from pykvm.switch.capture.source import Source
from pykvm.switch.geometry import MAX_FRAME, MAX_TAGS, MIN_FRAME, TAG_BYTES

__all__ = ["Capture", "Frame", "frame_of"]

_TAG_TYPES: Final = (b"\x81\x00", b"\x88\xa8")  # IEEE 802.1Q and 802.1ad


@dataclass(frozen=True)
class Frame:
    """One captured frame, without checksum.

    time_ns: since 1970. number: in its capture, from 1; 0 for a frame of another origin.
    """

    time_ns: int
    data: bytes
    number: int = field(default=0, compare=False)

    @property
    def destination(self) -> bytes:
        """Six octets."""
        return self.data[:6]

    @property
    def source(self) -> bytes:
        """Six octets."""
        return self.data[6:12]

    @property
    def tags(self) -> int:
        """Number of VLAN tags that follow the addresses."""
        tags = 0
        while self.data[12 + TAG_BYTES * tags :][:2] in _TAG_TYPES:
            tags += 1
        return tags

    @property
    def vlan(self) -> int:
        """Identifier in the outermost tag; 0 for a priority tag or none (IEEE 802.1Q, 9.6)."""
        return int.from_bytes(self.data[14:16], "big") & 0xFFF if self.tags else 0


@dataclass(frozen=True)
class Capture:
    """The frames of a capture, in order, and what to call it.

    name: for messages. operand: the file as commands that are suggested take it, quoted for the
    shell.
    """

    frames: list[Frame]
    name: str = "the capture"
    operand: str = "FILE"


def frame_of(source: Source, record: Record, frame_limit: int) -> Frame:
    """Return the frame of a record, whole and without its checksum.

    frame_limit: longest frame in bytes without tags.

    Raises FrameSizeError, CutFrameError, LoopbackCaptureError.
    """
    size = record.original - record.fcs
    who = f"{source.name}: frame {record.number}"
    if size < MIN_FRAME:
        raise FrameSizeError(
            f"{who} has {max(size, 0)} bytes, less than an Ethernet header",
            _without_short_ones(source, MIN_FRAME + record.fcs),
        )
    frame = Frame(record.time_ns, record.data[:size], record.number)
    if frame.data[:12] == bytes(12):
        raise LoopbackCaptureError(
            f"{who} has no addresses, as on a loopback interface (`lo`)",
            "capture on an Ethernet interface: `tcpdump -i eth0 -w FILE`",
        )
    if len(frame.data) < size:
        raise CutFrameError(
            f"{who} was cut to {len(record.data)} of {record.original} bytes (snapshot length)",
            "capture whole frames: `tcpdump -s 0 -w FILE`",
        )
    if frame.tags and size < MIN_FRAME + TAG_BYTES:
        raise FrameSizeError(
            f"{who} ends inside its VLAN tag",
            _without_short_ones(source, MIN_FRAME + TAG_BYTES + record.fcs),
        )
    longest = min(frame_limit + TAG_BYTES * min(frame.tags, MAX_TAGS), MAX_FRAME)
    if size > longest:
        raise _too_long(source, who, frame, longest, record.fcs)
    return frame


def _without_short_ones(source: Source, shortest: int) -> str:
    return f"leave such frames out: `tcpdump -r {source.operand} -w out.pcap greater {shortest}`"


def _too_long(source: Source, who: str, frame: Frame, longest: int, fcs: int) -> FrameSizeError:
    size = len(frame.data)
    if zlib.crc32(frame.data[:-4]).to_bytes(4, "little") == frame.data[-4:]:
        return FrameSizeError(
            f"{who} has {size} bytes with a checksum (FCS) that the capture does not announce",
            f"take it off: `editcap -F pcap -L -C -4 {source.operand} out.pcap`",
        )
    return FrameSizeError(
        f"{who} has {size} bytes, more than the {longest} of one Ethernet frame: "
        "put together by the network card (offload), or a jumbo frame",
        "capture again after `ethtool -K eth0 gro off lro off gso off tso off`, or leave such "
        f"frames out: `tcpdump -r {source.operand} -w out.pcap less {longest + fcs}`",
    )
