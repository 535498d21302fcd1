"""What an interrupt waits for when it comes while a vCPU is inside an object.

Nothing is injected outside the default context: the event is taken at the return. What it waits
for is measured in the guest alone: it finds out how long a call takes, arms the local APIC's timer
with a deadline that it knows, calls something whose work ends so many ticks behind that deadline,
and reads the time stamp counter in the handler's first instructions. The same work called directly,
in the default context, is interrupted at once: the difference is what the context costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa import crossing
from pykvm.elisa.objects import SharedObject
from pykvm.errors import PykvmError
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.exit_counter import ExitCounter, Exits
from pykvm.measure.programs import InterruptProgram, InterruptSample, interrupt_samples
from pykvm.measure.records import Samples
from pykvm.resources import GUEST_SOURCES

__all__ = ["LEFT", "InterruptPoint", "LateTimerError", "measure_interrupts"]

LEFT: Final = (0, 1000, 10_000, 100_000)
"""Ticks of work left at the deadline."""

_WAYS: Final = ("default", "object")
_LEAD: Final = 30_000
"""Ticks: an exit for the timer's MSR and the way into the object take less, on either host."""


class LateTimerError(PykvmError):
    """No interrupt came while the work was going on: its deadline had passed before the call."""


@dataclass(frozen=True)
class InterruptPoint:
    """Interrupts with one amount of work left, by one way.

    way: "default" (called directly) or "object" (in a sub context). left: ticks of work left at the
    deadline. latency: from the deadline to the handler. behind: from when the call would have been
    over to the handler, for those that were taken at the return page. at_return: how many those
    are. late: samples left out, whose call began behind the deadline.
    """

    way: str
    left: int
    latency: Samples
    behind: Samples | None
    at_return: int
    late: int
    exits: Exits

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "way": self.way,
            "left": self.left,
            "cost": self.latency.cost,
            **self.latency.as_dict(),
            "behind": self.behind.as_dict() if self.behind else None,
            "at_return": self.at_return,
            "late": self.late,
            "exits": self.exits.as_dict(),
        }


def measure_interrupts(
    kvm: Kvm, count: int, scale: float, left: Sequence[int] = LEFT
) -> list[InterruptPoint]:
    """`count` interrupts for each amount of work, directly and in an object, in one run.

    scale: the record's unit for one tick of the time-stamp counter.

    Raises LateTimerError, and what `BareGuest.run` and `ObjectInstance.attach` raise.
    """
    program = InterruptProgram(count, left, _LEAD)
    declared = SharedObject("work", GUEST_SOURCES / "objects" / "work.c", guests=1)
    with (
        declared.open() as instance,
        BareGuest(kvm, program, name="interrupts", irqchip=True) as guest,
    ):
        instance.attach(guest)
        counter = ExitCounter(guest.vcpu)
        guest.run(counter.mark)
        parts = interrupt_samples(guest.samples(), program)
    return [
        _point(
            ("default", "object")[part % 2], left[part // 2], samples, counter.parts[part], scale
        )
        for part, samples in enumerate(parts)
    ]


def _point(
    way: str, left: int, samples: Sequence[InterruptSample], exits: Exits, scale: float
) -> InterruptPoint:
    counted = is_emulated()
    valid = [one for one in samples if one.begun < one.deadline]
    if not valid:
        raise LateTimerError("every deadline passed before the call", "run it with less load")
    at_return = crossing.CROSSING_GVA + crossing.RETURN_OFFSET
    behind = [one.handler - one.expected for one in valid if one.rip == at_return]
    return InterruptPoint(
        way,
        left,
        Samples([one.handler - one.deadline for one in valid], scale, counted=counted),
        Samples(behind, scale, counted=counted) if behind else None,
        len(behind),
        len(samples) - len(valid),
        exits,
    )
