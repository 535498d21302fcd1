"""T31 to T33: a vCPU that stops in trusted code and does not come back by itself.

Revocation takes it home. The VMM that only sets its registers is refused.
"""

import errno
from collections.abc import Callable

import pytest

from pykvm.kvm import IoctlError, Kvm, Vcpu
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leap, Leaper, give_leaps
from tests.rigs.attacks.taken_home import (
    CLEARED,
    TRANSIENT,
    left_of_a_comparison,
    left_of_a_fault,
    revoked_behind_the_store,
)
from tests.rigs.attacks.vault_calls import failed
from tests.rigs.attacks.victim import (
    AT_SUB,
    WORD,
    C,
    join,
    still_serves,
    stolen,
    stop_at,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa


@pytest.mark.attack("T31")
@pytest.mark.parametrize("all_slots", [False, True], ids=["one slot", "all slots"])
def test_the_transient_slot_after_a_revocation(kvm: Kvm, guest: BareGuest, all_slots: bool) -> None:
    """The other gate still leads to the object, but the slot that the first one filled is empty."""
    with vault() as instance:
        weak = WeakAttachment(guest, instance)
        exits = revoked_behind_the_store(guest, instance, weak, all_slots=all_slots)
        assert failed(exits) == [(0, TRANSIENT)]
        assert not stolen(instance)
        assert untouched(instance)
        guest.close()
        weak.close()
        assert still_serves(kvm, instance)


GUESSES = {"below": WORD - 1, "above": WORD + 1, "half": WORD ^ 1 << 63, "parity": WORD ^ 3}


@pytest.mark.attack("T32")
@pytest.mark.parametrize("name", GUESSES)
def test_flags_of_a_comparison_with_a_secret(kvm: Kvm, name: str) -> None:
    assert left_of_a_comparison(kvm, GUESSES[name]) == CLEARED


@pytest.mark.attack("T32")
def test_the_place_of_a_fault(kvm: Kvm) -> None:
    assert left_of_a_fault(kvm) == CLEARED


def _registers(vcpu: Vcpu) -> list[int]:
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    general = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags")
    found = [getattr(regs, name) for name in (*general, *(f"r{n}" for n in range(8, 16)))]
    return [*found, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer]


STATES: dict[str, Callable[[Vcpu], None]] = {
    "registers": lambda vcpu: vcpu.set_regs(rip=0x1000),
    "system registers": lambda vcpu: vcpu.set_sregs(vcpu.get_sregs()),
    "system registers 2": lambda vcpu: vcpu.set_sregs2(vcpu.get_sregs2()),
    "fpu": lambda vcpu: vcpu.set_fpu(vcpu.get_fpu()),
    "xsave": lambda vcpu: vcpu.set_xsave(vcpu.get_xsave()),
    "xcrs": lambda vcpu: vcpu.set_xcrs(vcpu.get_xcrs()),
    "msrs": lambda vcpu: vcpu.set_msrs(vcpu.get_msrs([0xC000_0080])),
    "debug registers": lambda vcpu: vcpu.set_debug_regs(vcpu.get_debug_regs()),
    "events": lambda vcpu: vcpu.set_vcpu_events(vcpu.get_vcpu_events()),
    "cpuid": lambda vcpu: vcpu.set_cpuid2(vcpu.get_cpuid2()),
}
"""Every call that sets what a vCPU goes on with."""


@pytest.mark.attack("T33")
def test_the_vmm_sets_the_state_of_a_vcpu_inside(kvm: Kvm, guest: BareGuest) -> None:
    """Each call is refused and changes nothing; outside of the object each works."""
    with vault() as instance:
        slot = join(guest, instance).slot
        stop = C + instance.symbols["elisa_serve"]
        give_leaps(guest, Leap(slot=slot, dr0=stop))
        for set_state in STATES.values():
            set_state(guest.vcpu)
        guest.vcpu.set_regs(rip=Leaper().image().entry)
        assert stop_at(run(guest), AT_SUB).rip == stop
        before = _registers(guest.vcpu)
        for name, set_state in STATES.items():
            with pytest.raises(IoctlError, match="let the vcpu run on") as caught:
                set_state(guest.vcpu)
            assert caught.value.errno == errno.EBUSY, name
        assert _registers(guest.vcpu) == before
        assert stop_at([guest.vcpu.run()], AT_SUB).rip == stop
        assert untouched(instance)
        assert still_serves(kvm, instance)
