"""T29, T31 to T33, controls: a kernel that leaves a vCPU as trusted code had it."""

import pytest

from pykvm.elisa import crossing
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leap, give_leaps
from tests.rigs.attacks.segments import Jump, Jumper, Segments, give_jumps, landed
from tests.rigs.attacks.taken_home import (
    TRANSIENT,
    left_of_a_comparison,
    left_of_a_fault,
    revoked_behind_the_store,
)
from tests.rigs.attacks.vault_calls import copy_secret, home_stack
from tests.rigs.attacks.victim import (
    AT_GATE,
    AT_SUB,
    WORD,
    C,
    join,
    stolen,
    stop_at,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import run

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]

CARRY = 1


@pytest.mark.control("T31")
def test_a_slot_that_stays_filled_on_the_way_home(guest: BareGuest) -> None:
    with weakened(Weaken.HOME), vault() as instance:
        weak = WeakAttachment(guest, instance)
        assert revoked_behind_the_store(guest, instance, weak, all_slots=False) == []
        assert stolen(instance)
        guest.close()
        weak.close()


@pytest.mark.control("T32")
def test_flags_tell_how_a_guess_compares(kvm: Kvm) -> None:
    with weakened(Weaken.LEFT):
        found = [left_of_a_comparison(kvm, WORD + n).rflags & CARRY for n in (-1, 1)]
    assert len(set(found)) == 2


@pytest.mark.control("T32")
def test_rip_and_rsp_tell_where_it_stood(kvm: Kvm) -> None:
    with weakened(Weaken.LEFT):
        left = left_of_a_fault(kvm)
    inside = range(C, C + crossing.SHARED_OFFSET)
    assert left.rip in inside
    assert left.rsp in inside
    assert left.cr2


@pytest.mark.control("T33")
def test_registers_that_the_vmm_sets_start_internal_code(guest: BareGuest) -> None:
    """The VMM restarts a vCPU at an address that the guest has named."""
    with weakened(Weaken.STATE), vault() as instance:
        slot = join(guest, instance).slot
        home_stack(guest)
        attack = copy_secret(instance, TRANSIENT)
        give_leaps(guest, Leap(slot=slot, dr0=C + instance.symbols["elisa_serve"]))
        stop_at(run(guest), AT_SUB)
        named = {register.name.lower(): value for register, value in attack.registers.items()}
        guest.vcpu.set_regs(rip=attack.behind, **named)
        guest.vcpu.run()
        assert stolen(instance)


@pytest.mark.control("T29")
def test_a_process_stops_its_vm(kvm: Kvm) -> None:
    with weakened(Weaken.EJECT), BareGuest(kvm, Jumper()) as jumper, vault() as instance:
        slot = instance.attach_vcpu(jumper.vcpu, 0).slot
        jumper.announce(slot, instance.window_region(0, jumper.next_window_gpa()))
        give_jumps(jumper, Jump(Segments.USER, 0x5000_0800, slot))
        stop_at(run(jumper), AT_GATE)
        assert landed(jumper) == [None]
