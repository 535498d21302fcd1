"""Bare-metal guest programs of guest/bare: their parameters and their results.

Each class holds one program's parameters, which the head of its C file lists. `BareGuest` calls
``image()``, ``params()`` and ``input()``. The functions decode the data that programs leave in the
guest's memory.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pykvm.errors import PykvmError
from pykvm.kernel import uapi
from pykvm.machine.bare.build import build_guest
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.elf import ElfFile

__all__ = [
    "IDLE_LIMIT",
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
"""First of the hypercalls that user space answers (`Handlers.add_hypercall`)."""

IDLE_LIMIT: Final = 50_000_000
"""Polls of the lanes without progress before a guest gives up; a few seconds on a busy host."""

_RECORD: Final = struct.Struct("<II")
_SAMPLE: Final = struct.Struct("<QII")
_PHASE: Final = struct.Struct("<IIII")
_INTERRUPT: Final = struct.Struct("<6Q")


class LogError(PykvmError, ValueError):
    """A log of frames that ends inside a record or a frame."""


class Way(IntEnum):
    """Ways to call an empty function (``crossing.c``); EMPTY is the loop without a call."""

    EMPTY = 0
    VMFUNC = 1
    VMCALL_KERNEL = 2
    VMCALL_USER = 3
    DIRECT = 4


class SwitchPath(IntEnum):
    """Paths to the switch (``enum path`` in ``frames.h``)."""

    VMFUNC = 0
    VMCALL = 1
    DIRECT = 2


@dataclass(frozen=True)
class CrossingProgram:
    """Parameters of ``crossing.c``, which times empty calls; `way_samples` decodes the times.

    It sends mark 2n before way n, and mark 2n + 1 after it.

    Attributes:
        calls: number of calls in each way.
        ways: the ways to call.
        hypercall: number of the hypercall that the VMM answers.
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
    """Parameters of ``exchange.c``, which sends the frames of its input and logs what arrives.

    It sends mark 0 before everything and mark 1 after it. Its results are frames sent, frames
    received, samples, bytes of the log, and calls that had to wait. Status 1 means that it gave up.

    Attributes:
        path: path to the switch.
        expected: number of frames to wait for.
        burst: number of frames to send in one call.
        rounds: number of times to send all frames.
        hypercall: number of the hypercall that the VMM answers.
        idle_limit: polls without progress before it gives up.
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
    """A phase of ``burst.c``.

    Attributes:
        frame_bytes: bytes of a frame.
        burst: frames in one call.
        bursts: number of calls.
    """

    frame_bytes: int
    burst: int
    bursts: int

    @property
    def frames(self) -> int:
        return self.burst * self.bursts


@dataclass(frozen=True)
class BurstProgram:
    """Parameters of ``burst.c``, which sends frames in phases and takes what arrives.

    It sends mark 2n before phase n, and mark 2n + 1 after it. Its results are frames sent, frames
    received, samples, bytes received, and calls that had to wait. Status 1 means that it gave up.

    Attributes:
        path: path to the switch.
        own: Ethernet address of the sender, 6 bytes.
        to: Ethernet address of the receiver, 6 bytes.
        phases: the phases to send.
        expected: number of frames to wait for.
        hypercall: number of the hypercall that the VMM answers.
        idle_limit: polls without progress before it gives up.
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
    """Parameters of ``interrupts.c``, which interrupts direct calls and calls of an object.

    It sends mark 2n before part n, and mark 2n + 1 after it. Amount i of work has part 2i, called
    directly, and part 2i + 1, called in the object. `interrupt_samples` decodes the times.

    Attributes:
        count: number of interrupts in each part.
        left: amounts of work left at the timer's deadline, in ticks.
        lead: ticks from arming the timer to the deadline.
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
    """One interrupt, in readings of the guest's time-stamp counter.

    Attributes:
        deadline: the timer's deadline.
        begun: reading just before the call.
        expected: end of the call if nothing interrupted it.
        handler: reading in the handler's first instructions.
        rip: address of the interrupted instruction.
    """

    deadline: int
    begun: int
    expected: int
    handler: int
    rip: int


@dataclass(frozen=True)
class ReceivedFrame:
    """A frame as it arrived.

    Attributes:
        source: number of the sender's port.
        data: its bytes.
    """

    source: int
    data: bytes


@dataclass(frozen=True)
class SendSample:
    """One send call.

    Attributes:
        cycles: ticks of the time-stamp counter; like those of `Way.EMPTY`, they include reading it.
        wanted: frames in the call.
        sent: frames that the switch dealt with.
    """

    cycles: int
    wanted: int
    sent: int


def frame_records(frames: Iterable[bytes]) -> bytes:
    """Encode frames as the input of ``exchange.c``.

    A record is the frame's length and a zero, 32 bits each, then its bytes, padded to a multiple of
    8.
    """
    return b"".join(
        _RECORD.pack(len(frame), 0) + frame + bytes(-len(frame) % 8) for frame in frames
    )


def received_frames(log: bytes | memoryview) -> Iterator[ReceivedFrame]:
    """Yield the frames in the used part of a log that ``exchange.c`` wrote.

    Raises:
        LogError: the log ends inside a frame.
    """
    at = 0
    while at < len(log):
        if at + _RECORD.size > len(log):
            raise LogError(f"the log ends inside a record at byte {at}", "read all that is used")
        length, source = _RECORD.unpack_from(log, at)
        start = at + _RECORD.size
        at = start + length + -length % 8
        if at > len(log):
            raise LogError(
                f"the log ends inside a frame of {length} bytes", "read all that is used"
            )
        yield ReceivedFrame(source, bytes(log[start : start + length]))


def send_samples(samples: bytes | memoryview, count: int) -> list[SendSample]:
    """Return the first `count` samples that ``exchange.c`` or ``burst.c`` left."""
    return [SendSample(*_SAMPLE.unpack_from(samples, i * _SAMPLE.size)) for i in range(count)]


def interrupt_samples(
    samples: bytes | memoryview, program: InterruptProgram
) -> list[list[InterruptSample]]:
    """Return the samples of each part that ``interrupts.c`` left."""
    parts = 2 * len(program.left)
    records = _INTERRUPT.iter_unpack(samples[: parts * program.count * _INTERRUPT.size])
    each = [InterruptSample(*record[:5]) for record in records]
    return [each[n * program.count : (n + 1) * program.count] for n in range(parts)]


def way_samples(samples: bytes | memoryview, program: CrossingProgram) -> dict[Way, list[int]]:
    """Return the ticks of each call that ``crossing.c`` made, by way."""
    ticks = struct.iter_unpack(f"<{program.calls}Q", samples[: _way_bytes(program)])
    ways = sorted(set(program.ways))
    return {way: list(each) for way, each in zip(ways, ticks, strict=True)}


def _way_bytes(program: CrossingProgram) -> int:
    return 8 * program.calls * len(set(program.ways))
