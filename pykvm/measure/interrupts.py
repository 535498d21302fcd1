"""Latency of an interrupt that arrives while a vCPU is inside an object.

Nothing is injected outside the default context, so the interrupt is taken at the return. The guest
measures the latency alone. It finds out how long a call takes, arms the local APIC's timer with a
known deadline, calls a function whose work ends a given number of ticks after that deadline, and
reads the time-stamp counter in the handler's first instructions. The same work called directly, in
the default context, is interrupted at once; the difference is the cost of the context.
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
"""Ticks from setting the timer to its deadline; entering the object takes less on any host."""


class LateTimerError(PykvmError):
    """Deadlines that all passed before the call, so that no interrupt came during the work."""


@dataclass(frozen=True)
class InterruptPoint:
    """Interrupts with one amount of work left, called in one way.

    Attributes:
        way: "default" (called directly) or "object" (in a sub context).
        left: ticks of work left at the deadline.
        latency: ticks from the deadline to the handler.
        behind: ticks from the expected end of the call to the handler, for interrupts that were
            taken at the return page; None if there were none.
        at_return: number of interrupts that were taken at the return page.
        late: number of interrupts that are left out because their call began after the deadline.
        exits: VM exits of all calls.
    """

    way: str
    left: int
    latency: Samples
    behind: Samples | None
    at_return: int
    late: int
    exits: Exits

    def as_dict(self) -> dict[str, Any]:
        """Return the latencies for a record."""
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
    """Interrupt direct calls and calls of an object, all in one run.

    Args:
        kvm: an open ``/dev/kvm``.
        count: number of interrupts for each amount of work and each way.
        scale: one tick of the time-stamp counter in the record's unit.
        left: amounts of work left at the deadline, in ticks.

    Raises:
        LateTimerError: every deadline passed before the call.
        PykvmError: see `BareGuest.run` and `ObjectInstance.attach`.
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
