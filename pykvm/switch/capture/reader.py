"""Read a capture of any supported format."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from typing import Final

from pykvm.switch.capture.errors import EmptyCaptureError, ForeignCaptureError
from pykvm.switch.capture.frames import Capture, frame_of
from pykvm.switch.capture.pcap import byte_order, pcap_records
from pykvm.switch.capture.pcapng import SECTION_HEADER, pcapng_records
from pykvm.switch.capture.records import Record
from pykvm.switch.capture.source import Source, read_source
from pykvm.switch.geometry import DEFAULT_FRAME_LIMIT

__all__ = ["read_capture"]

_TEXT: Final = frozenset(string.printable.encode())


def read_capture(path: str | os.PathLike[str], frame_limit: int = DEFAULT_FRAME_LIMIT) -> Capture:
    """Return all frames of a capture of an Ethernet: pcap or pcapng, plain or compressed with gzip.

    path: a file, a pipe, or ``-`` for standard input; it is read once. frame_limit: bytes of the
    longest frame without tags, as `SwitchConfig` has it; 4 more are allowed for each VLAN tag.

    Every frame is whole, has a header at least, and has no checksum. Raises a subclass of
    CaptureError otherwise, which names the file and the frame (counted from 1).
    """
    source = read_source(os.fspath(path))
    frames = [frame_of(source, record, frame_limit) for record in _records(source)]
    if not frames:
        raise EmptyCaptureError(f"{source.name} holds no frames", "capture some traffic first")
    return Capture(frames, source.name, source.operand)


def _records(source: Source) -> Iterator[Record]:
    if source.data.startswith(SECTION_HEADER):
        return pcapng_records(source)
    if known := byte_order(source.data):
        return pcap_records(source, *known)
    if not source.data:
        raise ForeignCaptureError(
            f"{source.name} is empty", "name a capture: `tcpdump -w FILE` writes one"
        )
    if _TEXT.issuperset(source.data[:256]):
        raise ForeignCaptureError(
            f"{source.name} is text, not a capture", "let tcpdump write one: `tcpdump -w FILE`"
        )
    raise ForeignCaptureError(
        f"{source.name} is neither pcap nor pcapng",
        f"if Wireshark can open it, convert it: `editcap -F pcap {source.operand} out.pcap`",
    )
