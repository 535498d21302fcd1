"""A vCPU that stops in trusted code, and what is done to it there."""

from dataclasses import dataclass, replace

from pykvm.elisa import crossing
from pykvm.elisa.calls import revoke_slot, set_slot
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.trusted_images import build_object
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leap, Leaper, Register, give_leaps
from tests.rigs.attacks.objects import FAULTY_DECLARATION
from tests.rigs.attacks.vault_calls import copy_secret, home_stack, opens
from tests.rigs.attacks.victim import (
    AT_GATE,
    AT_SUB,
    SHARED,
    VAULT,
    WINDOW,
    C,
    join,
    stop_at,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment
from tests.rigs.probe import run

TRANSIENT = uapi.lib.KVM_ELISA_SLOT_TRANSIENT
LAST = C + crossing.GATE_OFFSET + 0xFFD  # the gate's last VMFUNC, behind its store
KEPT_FLAGS = 0x202  # IF, and the bit that is always set
BAD_POINTER = 0x1234_5678_9ABC


def check_revoked(exit: Exit) -> None:
    assert isinstance(exit, ElisaExit), exit
    assert exit.cause == uapi.lib.KVM_ELISA_EXIT_REVOKED


def revoked_behind_the_store(
    guest: BareGuest, instance: ObjectInstance, weak: WeakAttachment, *, all_slots: bool
) -> list[Exit]:
    """Stop the guest in one of two gates to the same object, behind its store; revoke that gate.

    The VMM then lets the guest begin again, with a leap into the object through the transient slot.

    Returns:
        The exits since then.
    """
    set_slot(guest.vcpu, 2, weak.gate)
    set_slot(guest.vcpu, 3, weak.second_gate())
    home_stack(guest)
    attack = copy_secret(instance, TRANSIENT)
    give_leaps(guest, Leap(slot=2), attack, Leap(slot=2, dr0=LAST))
    # The first two leaps show that the guest can leap, and that the slot is empty otherwise.
    assert stop_at(run(guest), AT_GATE).rip == LAST
    revoke_slot(guest.vm, 0, None if all_slots else 2)
    check_revoked(guest.vcpu.run())
    guest.set_input(Leaper((attack,)).input())
    guest.start_vcpu(guest.vcpu, Leaper().image().entry, layout.STACK_TOP_GPA, layout.BOOT_INFO_GPA)
    return run(guest)


@dataclass(frozen=True)
class Left:
    """State of a vCPU after a revocation, as the guest could find it."""

    rip: int
    rsp: int
    rflags: int
    cr2: int
    dr6: int


CLEARED = Left(0, 0, KEPT_FLAGS, 0, 0xFFFF_0FF0)
"""State in which nothing of trusted code is left."""


def _left_after_revocation(guest: BareGuest, slot: int) -> Left:
    revoke_slot(guest.vm, 0, slot)
    check_revoked(guest.vcpu.run())
    regs = guest.vcpu.get_regs()
    general = [getattr(regs, name) for name in ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi")]
    assert general == [0] * len(general) or regs.rip
    return Left(
        *(regs.rip, regs.rsp, regs.rflags),
        guest.vcpu.get_sregs().cr2,
        guest.vcpu.get_debug_regs().dr6,
    )


def _branch_before(offset: int) -> int:
    """Return where in the vault's image the conditional branch before an offset begins."""
    text = build_object([VAULT]).parts[1]
    code = text.data[: offset - text.offset]
    if code[-6] == 0x0F and code[-5] & 0xF0 == 0x80:  # near
        return offset - 6
    assert code[-2] & 0xF0 == 0x70  # short
    return offset - 2


def left_of_a_comparison(kvm: Kvm, guess: int) -> Left:
    """Stop the vault behind its comparison of a guess with its word, and revoke it."""
    with BareGuest(kvm, Leaper()) as guest, vault() as instance:
        slot = join(guest, instance).slot
        stop = C + _branch_before(instance.symbols["vault_opened"])
        give_leaps(guest, replace(opens(slot, guess), dr0=stop))
        assert stop_at(run(guest), AT_SUB).rip == stop
        return _left_after_revocation(guest, slot)


def left_of_a_fault(kvm: Kvm) -> Left:
    """Let an object fault at an address that it has computed, and revoke it."""
    with BareGuest(kvm, Leaper()) as guest, FAULTY_DECLARATION.open() as instance:
        slot = join(guest, instance).slot
        registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RDX: BAD_POINTER}
        give_leaps(guest, Leap(slot=slot, registers=registers))
        stop_at(run(guest), AT_SUB)
        return _left_after_revocation(guest, slot)
