"""Part a capture between two guests so that the switch carries every frame across.

The switch learns the port of each station and never sends a frame back to the port that it came
from. Stations that talk to each other therefore belong on different sides: the graph of who talks
to whom is coloured with two colours. Frames to groups, and to stations that never send and are
never learned, are flooded and so cross anyway. A station is an address on a VLAN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pykvm.switch.capture.errors import EmptyCaptureError, OddRingError
from pykvm.switch.capture.frames import Capture, Frame

__all__ = ["REASONS", "Sides", "split_capture"]

_Station = tuple[int, bytes]

_LINK_LOCAL: Final = b"\x01\x80\xc2\x00\x00"  # with one more octet, 0 to 15: IEEE 802.1Q, table 8-1

REASONS: Final = {
    "link_local": "for the link's own protocols (01:80:c2:00:00:00 to 0f)",
    "bad_source": "from a group address or from none",
    "same_port": "from a station to itself",
}
"""Reasons to forward a frame to nobody, by the name of the switch's counter."""


@dataclass(frozen=True)
class Sides:
    """Frames of a capture, parted.

    sent: for each guest, its frames in order. left_out: frames that a bridge forwards to nobody,
    by the names in `REASONS`.
    """

    sent: tuple[list[Frame], list[Frame]]
    left_out: dict[str, list[Frame]] = field(default_factory=dict)


def split_capture(capture: Capture) -> Sides:
    """Part a capture between two guests so that the switch carries every frame across.

    Guest 0 plays the station that sent the first frame. Where a station has nothing to do with it,
    the first one seen is guest 1's.

    Raises OddRingError when an odd number of stations talk to each other in a ring, and
    EmptyCaptureError when all frames come from one station.
    """
    left_out: dict[str, list[Frame]] = {}
    carried = []
    for frame in capture.frames:
        if reason := _reason_to_filter(frame):
            left_out.setdefault(reason, []).append(frame)
        else:
            carried.append(frame)
    if not carried:
        raise EmptyCaptureError(
            f"{capture.name} holds no frames that a switch forwards",
            "capture a conversation of two stations",
        )
    colours = _Colours()
    senders = {_sender(frame) for frame in carried}
    talk = [frame for frame in carried if _receiver(frame) in senders]
    for frame in talk:
        if not colours.separate(_sender(frame), _receiver(frame)):
            raise _odd_ring(capture, frame, talk)
    sent: tuple[list[Frame], list[Frame]] = ([], [])
    turned: dict[_Station, int] = {}  # for each root, whether its colours are exchanged
    for frame in carried:
        root, colour = colours.find(_sender(frame))
        wanted = 1 if turned else 0
        sent[colour ^ turned.setdefault(root, colour ^ wanted)].append(frame)
    if not sent[1]:
        raise EmptyCaptureError(
            f"{capture.name} holds frames of one station only, {_text(carried[0].source)}",
            "capture both directions of a conversation",
        )
    return Sides(sent, left_out)


def _sender(frame: Frame) -> _Station:
    return frame.vlan, frame.source


def _receiver(frame: Frame) -> _Station:
    return frame.vlan, frame.destination


def _reason_to_filter(frame: Frame) -> str:
    """A name in `REASONS`, or nothing for a frame that the switch forwards."""
    if frame.source[0] & 1 or not any(frame.source):
        return "bad_source"
    if frame.destination[:5] == _LINK_LOCAL and frame.destination[5] < 16:
        return "link_local"
    return "same_port" if frame.source == frame.destination else ""


def _odd_ring(capture: Capture, frame: Frame, talk: Sequence[Frame]) -> OddRingError:
    frames_of = Counter(one.source for one in talk) + Counter(one.destination for one in talk)
    # Of those that others send to, so that two stations at least are kept; the first of several.
    answering = dict.fromkeys(one.destination for one in talk)
    busiest = max(answering, key=lambda station: frames_of[station])
    return OddRingError(
        f"{capture.name}: frame {frame.number} ({_text(frame.source)} to "
        f"{_text(frame.destination)}) closes a ring of an odd number of stations that talk to each "
        "other, which two guests cannot play",
        f"keep the frames of one: `tcpdump -r {capture.operand} -w out.pcap "
        f"ether host {_text(busiest)}`",
    )


def _text(address: bytes) -> str:
    return address.hex(":")


class _Colours:
    """Two-colouring of a graph that grows by an edge at a time: union-find with parity."""

    def __init__(self) -> None:
        # Each station's parent, and 1 if the two have different colours.
        self._parents: dict[_Station, tuple[_Station, int]] = {}

    def find(self, station: _Station) -> tuple[_Station, int]:
        """Return the root of a station's tree, and 1 if the station's colour differs from it."""
        path = []
        colour = 0
        while station in self._parents:
            path.append(station)
            station, differs = self._parents[station]
            colour ^= differs
        root, total = station, colour
        for passed in path:
            differs = self._parents[passed][1]
            self._parents[passed] = root, colour
            colour ^= differs
        return root, total

    def separate(self, one: _Station, other: _Station) -> bool:
        """Give two stations different colours; return False if they have the same already."""
        (root, colour), (other_root, other_colour) = self.find(one), self.find(other)
        if root == other_root:
            return colour != other_colour
        self._parents[other_root] = root, colour ^ other_colour ^ 1
        return True
