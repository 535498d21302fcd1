"""Packet captures: read strictly, written, and parted between two guests.

`read_capture` returns the Ethernet frames of a pcap or pcapng file, also compressed with gzip,
from a file, a pipe or standard input. For everything else it raises a subclass of `CaptureError`,
which names the file, the frame and the command to type next. `split_capture` parts the frames
between two guests.
"""

from pykvm.switch.capture.errors import (
    CaptureError,
    CompressionError,
    CutFrameError,
    DamagedCaptureError,
    EmptyCaptureError,
    ForeignCaptureError,
    FrameSizeError,
    LinkTypeError,
    LoopbackCaptureError,
    OddRingError,
    TooLargeCaptureError,
    TruncatedCaptureError,
    UnreadableCaptureError,
)
from pykvm.switch.capture.frames import Capture, Frame
from pykvm.switch.capture.pcap import encode_capture, write_capture
from pykvm.switch.capture.reader import read_capture
from pykvm.switch.capture.sides import Sides, split_capture

__all__ = [
    "Capture",
    "CaptureError",
    "CompressionError",
    "CutFrameError",
    "DamagedCaptureError",
    "EmptyCaptureError",
    "ForeignCaptureError",
    "Frame",
    "FrameSizeError",
    "LinkTypeError",
    "LoopbackCaptureError",
    "OddRingError",
    "Sides",
    "TooLargeCaptureError",
    "TruncatedCaptureError",
    "UnreadableCaptureError",
    "encode_capture",
    "read_capture",
    "split_capture",
    "write_capture",
]
