"""Replay of a capture by two guests through the switch; every frame that arrives is compared."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.failures import GuestTimeoutError
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import SWITCH_SEED, connect
from pykvm.measure.exit_counter import ExitCounter, Exits
from pykvm.measure.programs import (
    IDLE_LIMIT,
    ExchangeProgram,
    SendSample,
    SwitchPath,
    frame_records,
    received_frames,
    send_samples,
)
from pykvm.measure.records import typical
from pykvm.sizes import MIB
from pykvm.switch.counters import DROP_REASONS, FILTER_REASONS, SwitchCounters
from pykvm.switch.geometry import SwitchConfig
from pykvm.switch.hosted import HostedSwitch

__all__ = [
    "Exchange",
    "ExchangeDroppedError",
    "ExchangeStuckError",
    "ExchangeTooLargeError",
    "check_room",
    "exchange",
]

BURST: Final = 32
TIMEOUT: Final = 300.0
"""Seconds for one exchange; the emulated host takes a few."""

# Room for several rounds of one side's frames. The guests share the emulated host's only
# processor, and a sender that has to wait splits its bursts differently in every run.
_LANE_SLOTS: Final = 4096


class ExchangeTooLargeError(PykvmError, ValueError):
    """More frames than a guest has room for."""


class ExchangeStuckError(PykvmError):
    """Guests that were too slow: one gave up waiting for its peer's frames, or took too long."""


class ExchangeDroppedError(PykvmError):
    """Frames that the switch did not forward and for which a guest waited in vain."""


@dataclass(frozen=True)
class Exchange:
    """Fate of the frames on one path, both directions together.

    Attributes:
        path: path to the switch.
        frames: frames of both sides, sent in each round.
        sent: frames that the guests sent.
        delivered: frames that the guests received.
        corrupted: frames received that differ from what was sent.
        dropped: frames that the switch did not deliver, by reason; its own counters.
        exits: VM exits between the first frame and the last.
        samples: the send calls of each guest, in order.
        lengths: number of frames that each guest sends in a round.
    """

    path: SwitchPath
    frames: int
    sent: int
    delivered: int
    corrupted: int
    dropped: dict[str, int]
    exits: Exits
    samples: list[list[SendSample]]
    lengths: list[int]

    @property
    def vm_exits_per_packet(self) -> float:
        return self.exits.own / self.sent

    @property
    def ticks_per_packet(self) -> float:
        """Ticks of the time-stamp counter that a sender spends on one packet, its call included.

        The same burst of all rounds is one group, which `typical` reduces to one value, so that the
        host's timer interrupts do not count.
        """
        ticks, frames = 0.0, 0
        for calls, length in zip(self.samples, self.lengths, strict=True):
            groups: dict[tuple[int, int], list[int]] = defaultdict(list)
            at = 0
            for call in calls:
                groups[at % length, call.sent].append(call.cycles)
                at += call.sent
            ticks += sum(typical(group, counted=is_emulated()) for group in groups.values())
            frames += sum(sent for _, sent in groups)
        return ticks / frames if frames else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the exchange for a record; ``bursts`` holds [ticks, frames] of each call."""
        return {
            "frames": self.frames,
            "sent": self.sent,
            "delivered": self.delivered,
            "dropped": sum(self.dropped.values()),
            "corrupted": self.corrupted,
            "drop_reasons": self.dropped,
            "vm_exits_per_packet": self.vm_exits_per_packet,
            "exits": self.exits.as_dict(),
            "bursts": [[[call.cycles, call.sent] for call in calls] for calls in self.samples],
        }


def exchange(
    kvm: Kvm,
    path: SwitchPath,
    sides: Sequence[Sequence[bytes]],
    *,
    rounds: int = 5,
    idle_limit: int = IDLE_LIMIT,
) -> Exchange:
    """Let two guests send their side of a conversation to each other.

    Args:
        kvm: an open ``/dev/kvm``.
        path: path to the switch.
        sides: frames of each guest, in order. The switch has to forward each of them to the other
            guest (`split_capture`).
        rounds: number of times to send all frames.
        idle_limit: polls of the lanes without progress before a guest gives up.

    Raises:
        ExchangeTooLargeError: a guest has no room for its frames or its peer's.
        ExchangeStuckError: a guest gave up waiting, or did not finish in time.
        ExchangeDroppedError: the switch did not forward frames for which a guest waited.
        PykvmError: see `BareGuest.run` and `ObjectInstance.attach`.
    """
    check_room(sides, rounds)
    config = SwitchConfig(ports=2, lane_slots=_LANE_SLOTS)
    with ExitStack() as stack:
        hosted = stack.enter_context(HostedSwitch(config, hash_seed=SWITCH_SEED, epoch=None))
        guests: list[BareGuest] = []
        counters: list[ExitCounter] = []
        for port, frames in enumerate(sides):
            program = ExchangeProgram(
                path,
                expected=len(sides[1 - port]) * rounds,
                burst=BURST,
                rounds=rounds,
                idle_limit=idle_limit,
            )
            guest = stack.enter_context(BareGuest(kvm, program, name=f"guest {port}"))
            guest.set_input(frame_records(frames))
            # Only as much room for received frames as it needs, because it touches all of it.
            guest.info.log_size = _room_of(sides[1 - port]) * rounds
            connect(guest, hosted, port, path)
            guests.append(guest)
            counters.append(ExitCounter(guest.vcpu))
        for guest, counter in zip(guests, counters, strict=True):
            guest.start(counter.mark)
        try:
            statuses = [guest.wait(TIMEOUT) for guest in guests]
        except GuestTimeoutError as error:
            raise ExchangeStuckError(
                f"the guests did not finish in {TIMEOUT:g} s",
                "send fewer frames or rounds, or run it again on a host with less load",
            ) from error
        results = [guest.results() for guest in guests]
        dropped = _drop_reasons(hosted.switch.counters())
        if any(statuses):
            raise _why_stuck([result[1] for result in results], dropped)
        wrong = sum(
            _wrong_frames(guest, result, sides[1 - port], rounds)
            for port, (guest, result) in enumerate(zip(guests, results, strict=True))
        )
        return Exchange(
            path=path,
            frames=sum(len(frames) for frames in sides),
            sent=sum(result[0] for result in results),
            delivered=sum(result[1] for result in results),
            corrupted=wrong,
            dropped=dropped,
            exits=counters[0].parts[0] + counters[1].parts[0],
            samples=[
                send_samples(guest.samples(), result[2])
                for guest, result in zip(guests, results, strict=True)
            ],
            lengths=[len(frames) for frames in sides],
        )


def _room_of(frames: Sequence[bytes]) -> int:
    """Return how many bytes the frames take in a guest's memory, sent or received."""
    return len(frame_records(frames))


def check_room(sides: Sequence[Sequence[bytes]], rounds: int) -> None:
    """Check that each guest has room for its frames and its peer's.

    Args:
        sides: frames of each guest.
        rounds: number of times to send all frames.

    Raises:
        ExchangeTooLargeError: a guest has no room.
    """
    largest = max(_room_of(frames) for frames in sides)
    if largest > layout.CAPTURE_SIZE:
        raise ExchangeTooLargeError(
            f"{-(-largest // MIB)} MiB of frames to send, a guest has room for "
            f"{layout.CAPTURE_SIZE // MIB} MiB",
            "take fewer frames: `tcpdump -r FILE -w first.pcap -c 10000`",
        )
    if largest * rounds > layout.RX_LOG_SIZE:
        raise ExchangeTooLargeError(
            f"{-(-largest * rounds // MIB)} MiB of frames to receive in {rounds} rounds, a guest "
            f"has room for {layout.RX_LOG_SIZE // MIB} MiB",
            f"send them less often: --rounds {layout.RX_LOG_SIZE // largest}",
        )


def _why_stuck(received: Sequence[int], dropped: Mapping[str, int]) -> PykvmError:
    """Return the error for guests that gave up waiting, with the switch's drop counters."""
    reasons = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
    if reasons:
        return ExchangeDroppedError(
            f"the switch did not forward {sum(dropped.values())} frames ({reasons})",
            "keep the capture, and report this with it",
        )
    arrived = " and ".join(str(count) for count in received)
    return ExchangeStuckError(
        f"the guests gave up waiting: {arrived} frames arrived",
        "run it again on a host with less load",
    )


def _drop_reasons(counters: SwitchCounters) -> dict[str, int]:
    """Return how many frames were not delivered and how many copies found no room, by reason."""
    reasons = {
        name: sum(getattr(port, name) for port in counters.ports)
        for name in (*DROP_REASONS, *FILTER_REASONS)
    }
    lanes = [lane for row in counters.lanes for lane in row]
    reasons["full"] = sum(lane.full for lane in lanes)
    reasons["bad_tail"] = sum(lane.bad_tail for lane in lanes)
    return reasons


def _wrong_frames(
    guest: BareGuest, result: Sequence[int], expected: Sequence[bytes], rounds: int
) -> int:
    """Return how many frames of a guest's log differ from those that its peer sent."""
    log = received_frames(guest.log(result[3]))
    wrong = 0
    for _ in range(rounds):
        for frame, arrived in zip(expected, islice(log, len(expected)), strict=False):
            wrong += frame != arrived.data
    return wrong + sum(1 for _ in log)
