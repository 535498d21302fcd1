"""Cost of one empty call: by VMFUNC, by VMCALL (to the kernel, to the VMM) and directly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pykvm.elisa.calls import enable_user_hypercalls
from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import ALL, Extra, Without
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
    """Cost of calling an empty function in one way.

    Attributes:
        calls: number of calls.
        samples: ticks of each call.
        exits: VM exits during all calls.
        vmfuncs: ``VMFUNC`` instructions in one call.
    """

    calls: int
    samples: Samples
    exits: Exits
    vmfuncs: int

    @property
    def vm_exits(self) -> float:
        """VM exits of one call, without those for the host's interrupts."""
        return self.exits.own / self.calls

    def as_dict(self) -> dict[str, Any]:
        """Return the cost for a record."""
        return {
            "vm_exits": self.vm_exits,
            "vmfuncs": self.vmfuncs,
            "cost": self.samples.cost,
            **self.samples.as_dict(),
            "exits": self.exits.as_dict(),
        }


@dataclass(frozen=True)
class Crossing:
    """Cost of an empty call in several ways, measured in one run.

    Attributes:
        ways: cost by the name of the way.
        empty: ticks of reading the counter alone.
        extra: protections for weak processors that a call by ``VMFUNC`` contains.
    """

    ways: dict[str, WayCost]
    empty: Samples
    extra: Extra

    def as_dict(self) -> dict[str, Any]:
        """Return the costs for a record."""
        return {
            **{name: way.as_dict() for name, way in self.ways.items()},
            "empty": self.empty.as_dict(),
            "for_weak_processors": sorted(one.name.lower() for one in self.extra),
        }


def measure_crossing(
    kvm: Kvm,
    calls: int,
    scale: float,
    ways: Sequence[Way] = tuple(WAY_NAMES),
    *,
    without: Without = ALL,
    extra: Extra | None = None,
) -> Crossing:
    """Run the crossing guest once, which makes empty calls in one way after the other.

    Args:
        kvm: an open ``/dev/kvm``.
        calls: number of calls in each way.
        scale: one tick of the time-stamp counter in the record's unit.
        ways: the ways to call.
        without: protections to leave out of the crossing.
        extra: protections for weak processors; by default those that this one needs.

    Raises:
        PykvmError: see `BareGuest.run` and `ObjectInstance.attach`.
    """
    program = CrossingProgram(calls=calls, ways=[Way.EMPTY, *ways])
    source = GUEST_SOURCES / "objects" / "nop.c"
    nop = SharedObject("nop", source, guests=1, without=without, extra=extra)
    images = crossing_images(without)
    with nop.open() as instance, BareGuest(kvm, program, name="crossing") as guest:
        enable_user_hypercalls(guest.vm)
        guest.vm.handlers.add_hypercall(HC_USER, NULL_HYPERCALL)
        instance.attach(guest)
        counter = ExitCounter(guest.vcpu)
        guest.run(counter.mark)
        ticks = way_samples(guest.samples(), program)
        # No host can count the VMFUNCs that succeed. The toolchain has checked that each page of
        # the crossing holds exactly one.
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
        instance.extra,
    )
