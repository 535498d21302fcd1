"""Cost of each protection of the crossing: an empty call with all of them, and without each.

Each point is a build of its own with one protection left out, measured as in
`pykvm.measure.crossing_cost`, in the same run and on the same machine. A protection is optional if
it is a second layer, or if it matters only to some objects. The figure of any other is the price of
an invariant. Protections for weak processors are measured the other way: a call with one of them,
against the one without any.

On the emulated host the figures are counts. There an LFENCE counts as one like any other
instruction; how long the processor waits for it shows only on hardware.
"""

from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import FOR_WEAK_PROCESSORS, NOTHING_EXTRA, Protection
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.crossing_cost import measure_crossing
from pykvm.measure.programs import Way
from pykvm.measure.records import Samples, typical
from pykvm.measure.user_mode import UserProgram, map_user_pages, user_samples
from pykvm.resources import GUEST_SOURCES

__all__ = ["MEASURED", "Measured", "ProtectionCost", "Protections", "measure_protections"]


@dataclass(frozen=True)
class Measured:
    """A protection whose cost is measured.

    Attributes:
        protection: the protection.
        user: whether it is measured with callers in user mode.
        optional: whether no known attack requires it: it is a second layer, or it hides data that
            is secret only in some objects.
        what: what the protection does, for the chart.
    """

    protection: Protection
    user: bool
    optional: bool
    what: str

    @property
    def added(self) -> bool:
        """Whether it is for weak processors: measured by adding it."""
        return self.protection in FOR_WEAK_PROCESSORS


MEASURED: Final = (
    Measured(Protection.GATE_BARRIER, False, True, "LFENCE behind the gate's check (T23)"),
    Measured(Protection.WINDOW_ACCESS, False, True, "STAC, CLAC: windows as user pages (I8)"),
    Measured(Protection.REGISTER_CLEARING, False, True, "registers cleared on return (T15)"),
    Measured(Protection.GATE_CHECK, False, False, "the gate's check (I2)"),
    Measured(Protection.SLOT_CLEARING, False, False, "emptying the slot on arrival (I1)"),
    Measured(Protection.FLAG_CLEARING, True, True, "RFLAGS.AC cleared for user mode (T10)"),
    Measured(
        Protection.BUFFER_CLEARING, False, False, "weak processors: VERW before the return (T38)"
    ),
    Measured(Protection.RETURN_THUNKS, False, False, "weak processors: return thunks (T38)"),
)


@dataclass(frozen=True)
class ProtectionCost:
    """Cost of one empty call with and without one protection.

    Attributes:
        measured: the protection.
        samples: ticks of the call that differs: without it, or with it if it is for weak
            processors.
        usual: cost of a call with all protections but those for weak processors, in the record's
            unit.
    """

    measured: Measured
    samples: Samples
    usual: float

    @property
    def call_without(self) -> float:
        """Cost of a call without the protection."""
        return self.usual if self.measured.added else self.samples.cost

    @property
    def call_with(self) -> float:
        """Cost of a call with the protection."""
        return self.samples.cost if self.measured.added else self.usual

    @property
    def cost(self) -> float:
        """Cost that the protection adds to a call, in the record's unit."""
        return self.call_with - self.call_without

    def as_dict(self) -> dict[str, Any]:
        """Return the cost for a record.

        ``ratio`` is that of a call with this protection to one without it.
        """
        return {
            "name": self.measured.protection.name.lower(),
            "what": self.measured.what,
            "mode": "user" if self.measured.user else "kernel",
            "optional": self.measured.optional,
            "for_weak_processors": self.measured.added,
            "call_without": self.call_without,
            "cost": self.cost,
            "ratio": self.call_with / self.call_without,
            **self.samples.as_dict(),
        }


@dataclass(frozen=True)
class Protections:
    """Cost of an empty call with all protections, without each of them, and with further ones.

    Attributes:
        kernel: ticks of a call from kernel mode, with all protections but those for weak
            processors.
        user: the same from user mode.
        costs: cost of each protection.
    """

    kernel: Samples
    user: Samples
    costs: list[ProtectionCost]

    def as_dict(self) -> dict[str, Any]:
        """Return the costs for a record."""
        return {
            "kernel": {"cost": self.kernel.cost, **self.kernel.as_dict()},
            "user": {"cost": self.user.cost, **self.user.as_dict()},
            "protections": [one.as_dict() for one in self.costs],
        }


def measure_protections(kvm: Kvm, calls: int, scale: float) -> Protections:
    """Run one guest for each build, one after the other.

    The object accesses no window, because it could not where STAC and CLAC are left out.

    Args:
        kvm: an open ``/dev/kvm``.
        calls: number of calls of each guest.
        scale: one tick of the time-stamp counter in the record's unit.

    Raises:
        PykvmError: see `BareGuest.run` and `ObjectInstance.attach`.
    """

    def cost(user: bool, only: Measured | None = None) -> Samples:
        chosen = frozenset({only.protection}) if only else frozenset()
        without = NOTHING_EXTRA if only and only.added else chosen
        extra = chosen if only and only.added else NOTHING_EXTRA
        if user:
            return _from_user_mode(kvm, calls, scale, without)
        ways = [Way.VMFUNC]
        crossing = measure_crossing(kvm, calls, scale, ways, without=without, extra=extra)
        return crossing.ways["vmfunc"].samples

    usual = {user: cost(user) for user in (False, True)}
    return Protections(
        usual[False],
        usual[True],
        [ProtectionCost(one, cost(one.user, one), usual[one.user].cost) for one in MEASURED],
    )


def _from_user_mode(kvm: Kvm, calls: int, scale: float, without: frozenset[Protection]) -> Samples:
    program = UserProgram(timed=calls)
    nop = SharedObject("nop", GUEST_SOURCES / "objects" / "nop.c", guests=1, without=without)
    with nop.open() as instance, BareGuest(kvm, program, name="user mode") as guest:
        instance.attach(guest, user=True)
        map_user_pages(guest, program)
        guest.run()
        empty, ticks = user_samples(guest.samples(), calls)
    counted = is_emulated()
    return Samples(ticks, scale, int(typical(empty, counted=counted)), counted)
