"""What one empty call costs: VMFUNC, VMCALL answered in the kernel and by the VMM, direct."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa.calls import enable_user_hypercalls
from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import ALL, Without
from pykvm.elisa.trusted_images import VMFUNC, crossing_images
from pykvm.host.emulation import is_emulated
from pykvm.kvm import NULL_HYPERCALL, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.exit_counter import ExitCounter, Exits
from pykvm.measure.programs import HC_USER, CrossingProgram, Way, way_samples
from pykvm.measure.records import Samples, typical
from pykvm.resources import GUEST_SOURCES

__all__ = ["WAY_NAMES", "Crossing", "WayCost", "measure_crossing"]

WAY_NAMES: Final = {
    Way.VMFUNC: "vmfunc",
    Way.VMCALL_KERNEL: "vmcall_kernel",
    Way.VMCALL_USER: "vmcall_user",
    Way.DIRECT: "direct",
}


@dataclass(frozen=True)
class WayCost:
    """One way to call nothing: `calls` times."""

    calls: int
    samples: Samples
    exits: Exits
    vmfuncs: int

    @property
    def vm_exits(self) -> float:
        """VM exits of one call, the host's interrupts aside."""
        return self.exits.own / self.calls

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "vm_exits": self.vm_exits,
            "vmfuncs": self.vmfuncs,
            "cost": self.samples.cost,
            **self.samples.as_dict(),
            "exits": self.exits.as_dict(),
        }


@dataclass(frozen=True)
class Crossing:
    """All ways in one run, by name, and the reading of the counter itself."""

    ways: dict[str, WayCost]
    empty: Samples

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            **{name: way.as_dict() for name, way in self.ways.items()},
            "empty": self.empty.as_dict(),
        }


def measure_crossing(
    kvm: Kvm,
    calls: int,
    scale: float,
    ways: Sequence[Way] = tuple(WAY_NAMES),
    *,
    without: Without = ALL,
) -> Crossing:
    """Run the crossing guest once; every way `calls` times, one after the other.

    scale: the record's unit for one tick of the time-stamp counter. without: protections to leave
    out of the crossing.

    Raises what `BareGuest.run` and `ObjectInstance.attach` raise.
    """
    program = CrossingProgram(calls=calls, ways=[Way.EMPTY, *ways])
    nop = SharedObject("nop", GUEST_SOURCES / "objects" / "nop.c", guests=1, without=without)
    images = crossing_images(without)
    with nop.open() as instance, BareGuest(kvm, program, name="crossing") as guest:
        enable_user_hypercalls(guest.vm)
        guest.vm.handlers.add_hypercall(HC_USER, NULL_HYPERCALL)
        instance.attach(guest)
        counter = ExitCounter(guest.vcpu)
        guest.run(counter.mark)
        ticks = way_samples(guest.samples(), program)
        # The pages of the crossing hold one VMFUNC each, which the toolchain has checked; no host
        # can count those that succeed.
        pages = [images.entry_page, images.gate_page, instance.sub_entry_page]
        vmfuncs = sum(page.count(VMFUNC) for page in pages)
    counted = is_emulated()
    empty = Samples(ticks[Way.EMPTY], scale, counted=counted)
    overhead = int(typical(ticks[Way.EMPTY], counted=counted))
    return Crossing(
        {
            WAY_NAMES[way]: WayCost(
                calls,
                Samples(ticks[way], scale, overhead, counted),
                counter.parts[way],
                vmfuncs if way is Way.VMFUNC else 0,
            )
            for way in ways
        },
        empty,
    )
