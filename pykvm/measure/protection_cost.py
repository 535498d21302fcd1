"""What each protection of the crossing costs: one empty call with all of them, and without one.

Each point is a build of its own with one protection left out, measured like `crossing`, in the
same run and on the same machine. `optional` are second layers and those that matter to some objects
only; for the others the figure says what an invariant costs.

On the emulated host the figures are counts: an LFENCE counts one like any other instruction, and
what it makes the processor wait for shows on hardware only.
"""

from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import Protection
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
    """optional: nothing that a guest can do today depends on it: it is a second layer, or
    it keeps from others what is no secret in every object."""

    protection: Protection
    user: bool
    optional: bool
    what: str


MEASURED: Final = (
    Measured(Protection.GATE_BARRIER, False, True, "LFENCE behind the gate's check (T23)"),
    Measured(Protection.WINDOW_ACCESS, False, True, "STAC, CLAC: windows as user pages (I8)"),
    Measured(Protection.REGISTER_CLEARING, False, True, "registers cleared on return (T15)"),
    Measured(Protection.GATE_CHECK, False, False, "the gate's check (I2)"),
    Measured(Protection.SLOT_CLEARING, False, False, "emptying the slot on arrival (I1)"),
    Measured(Protection.FLAG_CLEARING, True, True, "RFLAGS.AC cleared for user mode (T10)"),
)


@dataclass(frozen=True)
class ProtectionCost:
    """One empty call, all protections but one."""

    measured: Measured
    samples: Samples
    whole: float

    @property
    def cost(self) -> float:
        """What the protection adds to a call, in the record's unit."""
        return self.whole - self.samples.cost

    def as_dict(self) -> dict[str, Any]:
        """For a record. ratio: a call with all protections to one without this one."""
        return {
            "name": self.measured.protection.name.lower(),
            "what": self.measured.what,
            "mode": "user" if self.measured.user else "kernel",
            "optional": self.measured.optional,
            "call_without": self.samples.cost,
            "cost": self.cost,
            "ratio": self.whole / self.samples.cost,
            **self.samples.as_dict(),
        }


@dataclass(frozen=True)
class Protections:
    """A call with all protections, from kernel and from user mode, and each taken away."""

    kernel: Samples
    user: Samples
    without: list[ProtectionCost]

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "kernel": {"cost": self.kernel.cost, **self.kernel.as_dict()},
            "user": {"cost": self.user.cost, **self.user.as_dict()},
            "protections": [one.as_dict() for one in self.without],
        }


def measure_protections(kvm: Kvm, calls: int, scale: float) -> Protections:
    """Run one guest for each build, `calls` calls each, one after the other.

    The guests that leave out STAC and CLAC call an object that touches no window, as it must.
    scale: the record's unit for one tick of the time-stamp counter.

    Raises what `BareGuest.run` and `ObjectInstance.attach` raise.
    """

    def cost(user: bool, without: frozenset[Protection]) -> Samples:
        if user:
            return _from_user_mode(kvm, calls, scale, without)
        crossing = measure_crossing(kvm, calls, scale, [Way.VMFUNC], without=without)
        return crossing.ways["vmfunc"].samples

    whole = {user: cost(user, frozenset()) for user in (False, True)}
    return Protections(
        whole[False],
        whole[True],
        [
            ProtectionCost(one, cost(one.user, frozenset({one.protection})), whole[one.user].cost)
            for one in MEASURED
        ],
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
