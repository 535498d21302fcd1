"""The switch's counters, read out of its shared memory by any process that maps it.

Each counter has one writer, the calls of one port, and is read without stopping anybody: a
snapshot taken while frames flow can show a frame in one counter and not yet in another. When no
call is under way the sums hold that `SwitchCounters.check` states, and they hold again for a port
whose vCPU was killed in the middle of a call once ``Switch.disable(port, vcpu_gone=True)`` has
counted what was lost with it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

from pykvm.errors import PykvmError
from pykvm.switch._native import ffi, lib

__all__ = [
    "DROP_REASONS",
    "FILTER_REASONS",
    "LaneCounters",
    "NotASwitchError",
    "PortCounters",
    "SwitchCounters",
    "read_counters",
]

DROP_REASONS = ("too_short", "too_long", "no_receiver", "spoofed", "bad_source")
"""Names in `PortCounters` of the reasons to drop a frame before any lane is looked at."""

FILTER_REASONS = ("same_port", "link_local")
"""Names in `PortCounters` of the reasons for which a bridge does not forward a good frame."""


class NotASwitchError(PykvmError):
    """Memory that no switch has been initialised in."""


@dataclass(frozen=True)
class PortCounters:
    """Counts of one port's calls since the switch was created; `switch.h` explains each field."""

    calls: int
    frames: int
    bytes: int
    unicast: int
    broadcast: int
    multicast: int
    unknown: int
    copies: int
    too_short: int
    too_long: int
    same_port: int
    no_receiver: int
    spoofed: int
    bad_source: int
    link_local: int
    waited: int
    cut: int
    lost: int
    not_learned: int
    foreign_port: int
    bad_request: int
    port_down: int

    @property
    def forwarded(self) -> int:
        """Frames of which copies were made, or at least tried."""
        return self.unicast + self.broadcast + self.multicast + self.unknown

    @property
    def dropped(self) -> int:
        """Frames dropped before any lane was looked at."""
        return sum(getattr(self, name) for name in DROP_REASONS)

    @property
    def filtered(self) -> int:
        """Frames that a bridge does not forward."""
        return sum(getattr(self, name) for name in FILTER_REASONS)


@dataclass(frozen=True)
class LaneCounters:
    """Copies of frames from one source to one destination; dropped when `full` or `bad_tail`."""

    delivered: int = 0
    bytes: int = 0
    full: int = 0
    bad_tail: int = 0

    @property
    def dropped(self) -> int:
        """Copies that the receiver did not get."""
        return self.full + self.bad_tail

    def __add__(self, other: LaneCounters) -> LaneCounters:
        return LaneCounters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class SwitchCounters:
    """A snapshot: `ports[port]` and `lanes[source][destination]`."""

    epoch: int
    enabled: tuple[int, ...]
    ports: tuple[PortCounters, ...]
    lanes: tuple[tuple[LaneCounters, ...], ...]

    def sent_to(self, port: int) -> LaneCounters:
        """Return the sum of all lanes into `port`: what it could receive."""
        return sum((row[port] for row in self.lanes), LaneCounters())

    def sent_by(self, port: int) -> LaneCounters:
        """Return the sum of all lanes from `port`."""
        return sum(self.lanes[port], LaneCounters())

    def check(self) -> list[str]:
        """Return a line for each sum that does not hold, of an idle switch."""
        wrong = []
        for number, port in enumerate(self.ports):
            accounted = port.forwarded + port.dropped + port.filtered
            if port.frames != accounted:
                wrong.append(f"port {number}: {port.frames} frames, {accounted} accounted for")
            lanes = self.sent_by(number)
            if port.copies != lanes.delivered + lanes.dropped + port.lost:
                wrong.append(
                    f"port {number}: {port.copies} copies, {lanes.delivered} delivered, "
                    f"{lanes.dropped} dropped and {port.lost} lost"
                )
            if port.lost > port.cut * lib.SWITCH_MAX_BURST:
                wrong.append(f"port {number}: {port.lost} copies lost in {port.cut} cut calls")
        return wrong


def read_counters(buffer: Any) -> SwitchCounters:
    """Read all counters of the switch whose shared memory starts `buffer`.

    `buffer` is anything with the buffer protocol, also read-only, for instance an mmap of the
    object's memfd in another process. Raises NotASwitchError.
    """
    raw = ffi.from_buffer("uint8_t[]", buffer)
    needed = ffi.sizeof("struct switch_shared")
    if len(raw) < needed:
        raise NotASwitchError(
            f"a switch's shared memory has {needed} bytes, these are {len(raw)}", "map all of it"
        )
    shared = ffi.cast("struct switch_shared *", raw)
    if shared.magic != lib.SWITCH_SHARED_MAGIC:
        raise NotASwitchError("there is no switch in this memory", "create one with Switch(...)")
    if shared.version != lib.SWITCH_VERSION:
        raise NotASwitchError(
            f"the switch in this memory has version {shared.version}, not {lib.SWITCH_VERSION}",
            "read it with the pykvm that made it",
        )
    ports = range(min(shared.ports, lib.SWITCH_MAX_PORTS))

    def take(struct: Any, kind: Any) -> Any:
        return kind(**{field.name: getattr(struct, field.name) for field in fields(kind)})

    return SwitchCounters(
        epoch=shared.epoch,
        enabled=tuple(port for port in ports if shared.enabled >> port & 1),
        ports=tuple(take(shared.port[port], PortCounters) for port in ports),
        lanes=tuple(
            tuple(take(shared.lane[source][destination], LaneCounters) for destination in ports)
            for source in ports
        ),
    )
