"""The guest program probe.c: its steps, and a run that continues after refused VMFUNCs."""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.trusted_images import crossing_images
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Io, Kvm, Vcpu
from pykvm.machine.bare import boot_info
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.toolchain.elf import ElfFile
from tests.rigs.sources import GUESTS, OBJECTS

WILD = OBJECTS / "wild.c"

_STEP = struct.Struct("<IIQQQQQQ")
_EVENT = struct.Struct("<6Q")


class What(IntEnum):
    CALL = 0
    VMFUNC = 1
    MARK = 2
    READ = 3
    WRITE = 4
    CALL_WITH_CR3 = 5
    READ_MSR = 6
    WRITE_MSR = 7
    READ_CONTROL = 8
    WRITE_CONTROL = 9
    CPUID = 10
    LOAD_TABLE = 11
    STORE_TABLE = 12
    INTERRUPTS = 13
    ARM_TIMER = 14
    WAIT = 15
    HALT = 16
    TIME = 17


class Table(IntEnum):
    """First argument of LOAD_TABLE and STORE_TABLE."""

    GDT = 0
    IDT = 1
    LDT = 2
    TASK = 3


class Wild(IntEnum):
    """First argument of wild.c."""

    HELLO = 0
    READ = 1
    WRITE = 2
    RUN = 3
    LOOP = 4
    CPUID = 5
    VMCALL = 6


_ATTEMPT = 0x100
"""Flag in a step's `what`, and in `done` after a fault."""


@dataclass(frozen=True)
class Step:
    """One step of probe.c.

    Attributes:
        attempt: whether the step may take an exception; the next step follows either way.
    """

    what: What
    a: int = 0
    b: int = 0
    c: int = 0
    slot: int = 0
    cr3: int = 0
    attempt: bool = False

    def pack(self) -> bytes:
        what = self.what | (_ATTEMPT if self.attempt else 0)
        return _STEP.pack(what, self.slot, self.a, self.b, self.c, self.cr3, 0, 0)


@dataclass(frozen=True)
class Probe:
    """Guest program probe.c.

    Attributes:
        steps: may also be set later, with `give`.
        events: whether it takes and records interrupts.
    """

    steps: Sequence[Step] = field(default=())
    events: bool = False

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "probe.c", GUESTS / "attempt.c", "events.c"])

    def params(self) -> list[int]:
        return [int(self.events)]

    def input(self) -> bytes:
        return b"".join(step.pack() for step in self.steps)


def prepare(guest: BareGuest) -> None:
    """Lay the guest's own pages of the crossing where the calls need them."""
    guest.map_crossing(crossing_images())


@contextmanager
def probe_guest(kvm: Kvm, *, levels: int = 4) -> Iterator[BareGuest]:
    """Create a prepared guest that executes the steps passed to `give`.

    Args:
        levels: levels of its paging.
    """
    with BareGuest(kvm, Probe(), paging_levels=levels) as guest:
        prepare(guest)
        yield guest


def give(guest: BareGuest, *steps: Step) -> None:
    """Set the steps before the first run."""
    guest.set_input(Probe(steps).input())


def calls(slot: int, *arguments: int) -> Step:
    a, b, c = (*arguments, 0, 0, 0)[:3]
    return Step(What.CALL, a, b, c, slot)


def results(guest: BareGuest) -> list[int | None]:
    """Return the result of each step; None for one that has not come back."""
    return [result if done == 1 else None for result, done in _ends(guest)]


def faults(guest: BareGuest) -> list[int | None]:
    """Return the vector of the exception that each step took; None for one that took none."""
    return [done - _ATTEMPT if done >= _ATTEMPT else None for _, done in _ends(guest)]


def _ends(guest: BareGuest) -> list[tuple[int, int]]:
    data = guest.memory.read(guest.info.input, guest.info.input_size)
    return [(result, done) for *_, result, done in _STEP.iter_unpack(data)]


@dataclass(frozen=True)
class Event:
    """An interrupt or NMI, and the place where it arrived: struct event of events.h."""

    vector: int
    time: int
    rip: int
    rflags: int
    rsp: int


def events_taken(guest: BareGuest) -> int:
    """Return the number of events that the guest has taken; also works while it runs."""
    return int(guest.info.result[1])


def events(guest: BareGuest) -> list[Event]:
    """Return all events in the order in which the guest took them."""
    data = guest.samples(events_taken(guest) * _EVENT.size)
    return [Event(*words[:5]) for words in _EVENT.iter_unpack(data)]


def run(
    guest: BareGuest,
    on_mark: Callable[[int], object] | None = None,
    *,
    vcpu: Vcpu | None = None,
) -> list[Exit]:
    """Run to the end, skipping each VMFUNC that fails in the default context.

    Args:
        guest: the guest.
        on_mark: called with the value of each mark.
        vcpu: one of its vCPUs; by default the first.

    Returns:
        The exits of these VMFUNCs. If any other exit stopped the guest, it comes last; it is
        `Stopped` if a minute has passed.
    """
    vcpu = vcpu or guest.vcpu
    deadline = threading.Timer(60, vcpu.stop)
    deadline.daemon = True
    deadline.start()
    try:
        return _run(vcpu, on_mark)
    finally:
        deadline.cancel()


def _run(vcpu: Vcpu, on_mark: Callable[[int], object] | None) -> list[Exit]:
    seen: list[Exit] = []
    while True:
        exit = vcpu.run()
        match exit:
            case Io(port=boot_info.FINISH_PORT):
                assert exit.value == 0
                return seen
            case Io(port=boot_info.MARK_PORT):
                assert on_mark is not None
                on_mark(exit.value)
            case ElisaExit(cause=uapi.lib.KVM_ELISA_EXIT_VMFUNC, at=uapi.lib.KVM_ELISA_AT_DEFAULT):
                seen.append(exit)
                vcpu.set_regs(rip=exit.rip + 3)
            case _:
                seen.append(exit)
                return seen
