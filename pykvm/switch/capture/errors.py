"""Everything that can be wrong with a capture, one class for each cause."""

from pykvm.errors import PykvmError

__all__ = [
    "CaptureError",
    "CompressionError",
    "CutFrameError",
    "DamagedCaptureError",
    "EmptyCaptureError",
    "ForeignCaptureError",
    "FrameSizeError",
    "LinkTypeError",
    "LoopbackCaptureError",
    "OddRingError",
    "TooLargeCaptureError",
    "TruncatedCaptureError",
    "UnreadableCaptureError",
]


class CaptureError(PykvmError):
    """Root of the errors for a capture that cannot be used."""


class UnreadableCaptureError(CaptureError):
    """A file or pipe that the system does not let us read."""


class TooLargeCaptureError(CaptureError):
    """More bytes than two guests could ever hold."""


class CompressionError(CaptureError):
    """Damaged gzip data, or a compression other than gzip."""


class ForeignCaptureError(CaptureError):
    """Neither pcap nor pcapng, or a version of them that is not known."""


class LinkTypeError(CaptureError):
    """A capture of something other than Ethernet."""


class LoopbackCaptureError(CaptureError):
    """Ethernet frames without addresses, as Linux's loopback interface has them."""


class TruncatedCaptureError(CaptureError):
    """A file that ends inside a header or a frame."""


class DamagedCaptureError(CaptureError):
    """A record that cannot have been written so."""


class CutFrameError(CaptureError):
    """A frame of which the capture holds the beginning only."""


class FrameSizeError(CaptureError):
    """A frame shorter than an Ethernet header or longer than the port's limit."""


class EmptyCaptureError(CaptureError):
    """A capture without frames, or without a second station."""


class OddRingError(CaptureError):
    """Stations that cannot be parted in two so that all frames cross."""
