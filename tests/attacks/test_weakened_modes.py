"""T7, controls: a kernel that ignores the mode lets VMFUNC through in any."""

from collections.abc import Iterator

import pytest

from pykvm.elisa.crossing import CROSSING_GVA
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Exit, Hlt, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.victim import AT_GATE
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import Step, What, faults, give, probe_guest, results, run
from tests.rigs.processor_modes import (
    CODE,
    CR4,
    LONG_MODE_CODE,
    OFF,
    SMAP,
    try_call,
    try_vmfunc,
    vmfunc_in,
)

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with probe_guest(kvm) as guest:
        yield guest


@pytest.mark.control("T7")
@pytest.mark.parametrize("name", OFF)
def test_any_mode_reaches_a_context(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    """VMFUNC works, and with a gate's slot the vCPU is in the gate context, in that mode."""
    seen: list[Exit] = []

    def on_mark(slot: int) -> None:
        seen.append(vmfunc_in(guest, OFF[name], slot))
        if slot:
            guest.vcpu.stop()  # it cannot return from there

    with weakened(Weaken.MODE | Weaken.STATE):
        slot = counter.attach(guest).slot
        guest.map(LONG_MODE_CODE, CODE, PAGE_SIZE, Access.READ | Access.EXECUTE)
        give(guest, Step(What.MARK, 0), Step(What.MARK, slot))
        run(guest, on_mark)
        works, inside = seen
        assert works == Hlt()
        assert isinstance(inside, ElisaExit)
        assert (inside.at, inside.slot) == (AT_GATE, slot)
        assert not CROSSING_GVA <= inside.rip < CROSSING_GVA + PAGE_SIZE


@pytest.mark.control("T7")
@pytest.mark.processor("LA57")
def test_contexts_for_four_levels_in_five(kvm: Kvm, counter: ObjectInstance) -> None:
    """VMFUNC works, and takes a guest with five levels to a gate whose tables have four."""
    with weakened(Weaken.MODE), probe_guest(kvm, levels=5) as guest:
        slot = counter.attach_vcpu(guest.vcpu, 0, levels=4).slot
        give(guest, try_vmfunc(), try_call(slot))
        exit = run(guest)[-1]
        assert faults(guest)[0] is None
        assert isinstance(exit, ElisaExit)
        assert (exit.at, exit.slot) == (AT_GATE, slot)


@pytest.mark.control("T7")
def test_without_smap_the_object_serves(guest: BareGuest, counter: ObjectInstance) -> None:
    """The whole crossing works in a mode for which the sub context's pages were not laid out."""
    with weakened(Weaken.MODE | Weaken.STATE):
        slot = counter.attach(guest).slot
        give(
            guest,
            Step(What.WRITE_CONTROL, 4, CR4 & ~SMAP),
            try_vmfunc(),
            try_call(slot),
            Step(What.READ_CONTROL, 4),
        )
        assert run(guest) == []
        assert faults(guest) == [None] * 4
        assert results(guest)[2:] == [1, CR4 & ~SMAP]
