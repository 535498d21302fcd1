"""The bare-metal guest programs of guest/bare: what each takes, and what it leaves behind.

Each class is one program's parameters, as the head of its C file lists them. `image()` builds it,
`params()` and `input()` are what `BareGuest` wants; results are read back with the functions.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pykvm.kernel import uapi
from pykvm.machine.bare.build import build_guest
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.elf import ElfFile

__all__ = [
    "BurstProgram",
    "CrossingProgram",
    "ExchangeProgram",
    "InterruptProgram",
    "InterruptSample",
    "LogError",
    "Phase",
    "ReceivedFrame",
    "SendSample",
    "SwitchPath",
    "Way",
    "frame_records",
    "interrupt_samples",
    "received_frames",
    "send_samples",
    "way_samples",
]

HC_USER: Final[int] = uapi.lib.KVM_HC_ELISA_USER
"""The first of the hypercalls that user space answers (`Handlers.add_hypercall`)."""

IDLE_LIMIT: Final = 50_000_000
"""Looks at the lanes without progress: seconds, so that a waiting guest outlasts a busy host."""

_RECORD: Final = struct.Struct("<II")
_SAMPLE: Final = struct.Struct("<QII")
_PHASE: Final = struct.Struct("<IIII")
_INTERRUPT: Final = struct.Struct("<6Q")


class LogError(ValueError):
    """A guest's log of frames that does not end where the guest says."""


class Way(IntEnum):
    """Ways to call something that does nothing (crossing.c). EMPTY is the loop without a call."""

    EMPTY = 0
    VMFUNC = 1
    VMCALL_KERNEL = 2
    VMCALL_USER = 3
    DIRECT = 4


class SwitchPath(IntEnum):
    """Ways to the switch (enum path in frames.h)."""

    VMFUNC = 0
    VMCALL = 1
    DIRECT = 2


@dataclass(frozen=True)
class CrossingProgram:
    """crossing.c: times `calls` calls of each of `ways`.

    Marks 2n before and 2n + 1 after way n. `way_samples` reads the times.
    """

    calls: int
    ways: Sequence[Way]
    hypercall: int = HC_USER

    def image(self) -> ElfFile:
        return build_guest(["crossing.c"], objects=["nop.c"])

    def params(self) -> list[int]:
        return [self.calls, sum(1 << way for way in set(self.ways)), self.hypercall]


@dataclass(frozen=True)
class ExchangeProgram:
    """exchange.c: sends its input `rounds` times in bursts of `burst`, logs what arrives.

    expected: frames to wait for. Marks 0 and 1 around everything. Results: frames sent, received,
    samples, bytes of log, calls that had to wait. Status 1: gave up after `idle_limit` looks.
    """

    path: SwitchPath
    expected: int
    burst: int = 32
    rounds: int = 1
    hypercall: int = HC_USER
    idle_limit: int = IDLE_LIMIT

    def image(self) -> ElfFile:
        return build_guest(["exchange.c", "frames.c"], objects=[GUEST_SOURCES / "switch/switch.c"])

    def params(self) -> list[int]:
        return [
            *(self.path, self.hypercall, self.rounds),
            *(self.expected, self.burst, self.idle_limit),
        ]


@dataclass(frozen=True)
class Phase:
    """`bursts` calls of `burst` frames of `frame_bytes` each."""

    frame_bytes: int
    burst: int
    bursts: int

    @property
    def frames(self) -> int:
        return self.burst * self.bursts


@dataclass(frozen=True)
class BurstProgram:
    """burst.c: sends each of `phases` from station `own` to station `to`, takes what arrives.

    Addresses are 6 bytes each. Marks 2n before and 2n + 1 after phase n. Results: frames sent,
    received, samples, bytes received, calls that had to wait. Status 1: gave up.
    """

    path: SwitchPath
    own: bytes
    to: bytes
    phases: Sequence[Phase]
    expected: int = 0
    hypercall: int = HC_USER
    idle_limit: int = IDLE_LIMIT

    def image(self) -> ElfFile:
        return build_guest(["burst.c", "frames.c"], objects=[GUEST_SOURCES / "switch/switch.c"])

    def params(self) -> list[int]:
        return [
            *(self.path, self.hypercall, self.expected, self.idle_limit),
            *(int.from_bytes(address, "little") for address in (self.own, self.to)),
        ]

    def input(self) -> bytes:
        return b"".join(_PHASE.pack(p.frame_bytes, p.burst, p.bursts, 0) for p in self.phases)


@dataclass(frozen=True)
class InterruptProgram:
    """interrupts.c: `count` interrupts for each amount of work, called directly and in an object.

    left: amounts of work left at the timer's deadline, in ticks. lead: ticks from arming the timer
    to the deadline. Marks 2n and 2n + 1 around part n; amount i has parts 2i (direct) and 2i + 1.
    """

    count: int
    left: Sequence[int]
    lead: int

    def image(self) -> ElfFile:
        return build_guest(["interrupts.c", "events.c"], objects=["work.c"])

    def params(self) -> list[int]:
        return [self.count, self.lead]

    def input(self) -> bytes:
        return struct.pack(f"<{len(self.left)}Q", *self.left)


@dataclass(frozen=True)
class InterruptSample:
    """One interrupt, in ticks of the guest's time stamp counter.

    deadline: of the timer. begun: before the call. expected: when the call would be over if nothing
    interrupted it. handler: in the handler's first instructions. rip: where the interrupt came.
    """

    deadline: int
    begun: int
    expected: int
    handler: int
    rip: int


@dataclass(frozen=True)
class ReceivedFrame:
    """A frame as it arrived, and the port that it came from."""

    source: int
    data: bytes


@dataclass(frozen=True)
class SendSample:
    """One send call: time stamp counter ticks, frames in the call, frames dealt with.

    The ticks include reading the counter, as those of `Way.EMPTY` do.
    """

    cycles: int
    wanted: int
    sent: int


def frame_records(frames: Iterable[bytes]) -> bytes:
    """Frames as exchange.c takes them: length, 32 bits, bytes padded to 8."""
    return b"".join(
        _RECORD.pack(len(frame), 0) + frame + bytes(-len(frame) % 8) for frame in frames
    )


def received_frames(log: bytes | memoryview) -> Iterator[ReceivedFrame]:
    """The frames in the used part of a log that exchange.c wrote.

    Raises LogError.
    """
    at = 0
    while at < len(log):
        if at + _RECORD.size > len(log):
            raise LogError(f"the log ends inside a record at byte {at}: read all that is used")
        length, source = _RECORD.unpack_from(log, at)
        start = at + _RECORD.size
        at = start + length + -length % 8
        if at > len(log):
            raise LogError(f"the log ends inside a frame of {length} bytes: read all that is used")
        yield ReceivedFrame(source, bytes(log[start : start + length]))


def send_samples(samples: bytes | memoryview, count: int) -> list[SendSample]:
    """The first `count` samples that exchange.c or burst.c left."""
    return [SendSample(*_SAMPLE.unpack_from(samples, i * _SAMPLE.size)) for i in range(count)]


def interrupt_samples(
    samples: bytes | memoryview, program: InterruptProgram
) -> list[list[InterruptSample]]:
    """What interrupts.c left: the samples of each part."""
    parts = 2 * len(program.left)
    records = _INTERRUPT.iter_unpack(samples[: parts * program.count * _INTERRUPT.size])
    each = [InterruptSample(*record[:5]) for record in records]
    return [each[n * program.count : (n + 1) * program.count] for n in range(parts)]


def way_samples(samples: bytes | memoryview, program: CrossingProgram) -> dict[Way, list[int]]:
    """Time stamp counter ticks of each call that crossing.c made, by way."""
    ticks = struct.iter_unpack(f"<{program.calls}Q", samples[: _way_bytes(program)])
    ways = sorted(set(program.ways))
    return {way: list(each) for way, each in zip(ways, ticks, strict=True)}


def _way_bytes(program: CrossingProgram) -> int:
    return 8 * program.calls * len(set(program.ways))
