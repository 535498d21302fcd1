"""T14, T15: flags and registers, on entry to trusted code and after the return."""

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.edits import NO_CLD, NO_STACK
from tests.rigs.attacks.leap import FLAGS, OWN_PAGES, Leap, Leaper, Register, give_leaps, left
from tests.rigs.attacks.objects import LEAKING_NOP
from tests.rigs.attacks.vault_calls import LETTER, LETTER_AT, opens, post
from tests.rigs.attacks.victim import (
    KNOCK,
    OPEN,
    SHARED,
    VAULT,
    WINDOW,
    WORD_AT,
    C,
    join,
    still_serves,
    stolen,
    untouched,
    vault,
    word,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment, weak_gate, weak_sub_entry
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

DIRECTION = 1 << 10
ODD_FLAGS = {
    "direction": DIRECTION,
    "carry, parity, adjust, zero, sign, overflow": 0x8D5,
    "nested task": 1 << 14,
    "resume": 1 << 16,
    "identification": 1 << 21,
    "privilege level 3": 3 << 12,
    "no alignment check": 0,
}


@pytest.mark.attack("T14")
@pytest.mark.parametrize("name", ODD_FLAGS)
def test_odd_flags(kvm: Kvm, guest: BareGuest, name: str) -> None:
    """A letter is stored in its place, whatever the flags."""
    with vault() as instance:
        slot = join(guest, instance).slot
        flags = ODD_FLAGS[name] | FLAGS if ODD_FLAGS[name] else 0x202
        instance.window(0)[:LETTER] = bytes(range(1, LETTER + 1))
        give_leaps(guest, post(slot, flags), opens(slot, 0))
        assert run(guest) == []
        assert [out and out[Register.RAX] for out in left(guest)] == [0, 2**64 - 1]  # EPERM
        letter = instance.shared[LETTER_AT : LETTER_AT + LETTER]
        assert bytes(letter) == bytes(range(1, LETTER + 1))
        letter[:] = bytes(LETTER)
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T14")
def test_without_cld_a_copy_runs_backwards(guest: BareGuest) -> None:
    """A gate that leaves the direction flag alone lets the letter overwrite the vault's word.

    The word then holds zero bytes from before the window.
    """
    with vault() as instance:
        weak = WeakAttachment(guest, instance, gate_page=weak_gate(NO_CLD))
        slot = weak.enter_through_gate()
        give_leaps(guest, post(slot, FLAGS | DIRECTION), opens(slot, 0))
        assert run(guest) == []
        assert stolen(instance)
        guest.close()
        weak.close()


# ---- the stack pointer ---------------------------------------------------------------------------

STACK_POINTERS = {
    "odd": layout.STACK_GPA + 0x801,
    "zero": 0,
    "in the window": WINDOW + 0x1000,
    "in the shared memory": SHARED + WORD_AT + 8,
    "not canonical": 1 << 63,
}


@pytest.mark.attack("T14")
@pytest.mark.parametrize("name", STACK_POINTERS)
def test_odd_stack_pointers(kvm: Kvm, guest: BareGuest, name: str) -> None:
    """Trusted code does not use the guest's stack pointer, which the guest gets back."""
    with vault() as instance:
        slot = join(guest, instance).slot
        back = Leaper().image().address_of("leap_back")
        guest.memory.write(layout.RETURN_PAGE_GPA, b"\x49\xbb" + back.to_bytes(8, "little"))
        guest.memory.write(layout.RETURN_PAGE_GPA + 10, b"\x41\xff\xe3")  # jmp *%r11
        registers = {Register.RDI: KNOCK, Register.RSP: STACK_POINTERS[name]}
        give_leaps(guest, Leap(slot=slot, registers=registers), Leap(slot=slot))
        assert run(guest) == []
        first, _ = left(guest)
        assert first is not None
        if STACK_POINTERS[name]:
            assert first[Register.RSP] == STACK_POINTERS[name]
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T14")
def test_without_a_stack_of_its_own_the_guests_is_written_to(guest: BareGuest) -> None:
    """A sub entry that keeps rsp writes its call's return address over the vault's word."""
    with vault(weak_sub_entry(VAULT, NO_STACK)) as instance:
        slot = join(guest, instance).slot
        back = Leaper().image().address_of("leap_back")
        guest.map(0, layout.RX_LOG_GPA, PAGE_SIZE, OWN_PAGES)  # `pop %rsp` leads there
        guest.memory.write(layout.RX_LOG_GPA, back.to_bytes(8, "little"))
        registers = {Register.RDI: KNOCK, Register.RSP: SHARED + WORD_AT + 8}
        address = C + instance.symbols["serve"] + 5
        ordinary = {Register.RDI: OPEN, Register.RSI: address, Register.RSP: WINDOW + 0x1000}
        instance.window(0)[0x1000:0x1008] = bytes(8)
        give_leaps(
            guest,
            Leap(slot=slot, registers=registers),
            Leap(slot=slot, registers=ordinary),
        )
        assert run(guest) == []
        assert word(instance.shared, WORD_AT) == address
        assert stolen(instance)


# ---- T15 -----------------------------------------------------------------------------------------

CLEARED = [Register[name] for name in ("RCX", "RSI", "RDI", "R8", "R9", "R10", "R11")]
KEPT = [Register[name] for name in ("RBX", "RBP", "R12", "R13", "R14", "R15")]
MINE = 0x5A5A_A5A5_1234_8765


def registers_after(guest: BareGuest, instance: ObjectInstance) -> dict[Register, int]:
    """Return the registers after a call with all registers filled."""
    slot = join(guest, instance).slot
    give_leaps(guest, Leap(slot=slot, fill=MINE))
    assert run(guest) == []
    (out,) = left(guest)
    assert out is not None
    return out


@pytest.mark.attack("T15")
def test_nothing_is_left_in_registers(guest: BareGuest) -> None:
    with vault() as instance:
        out = registers_after(guest, instance)
        assert {out[register] for register in CLEARED} == {0}
        assert {out[register] for register in KEPT} == {MINE}
        assert out[Register.RAX] == out[Register.RDX] == 2**64 - 22  # EINVAL and nothing else


@pytest.mark.control("T15")
def test_without_clearing_an_eptp_is_left(guest: BareGuest) -> None:
    """The HPA of the sub context's EPT, loaded by the gate, stays in a register.

    The object does nothing and leaves it alone.
    """
    with LEAKING_NOP.open() as instance:
        out = registers_after(guest, instance)
        # Write-back, four levels, no accessed and dirty flags (SDM vol. 3C, table 25-9).
        leaked = [out[r] for r in CLEARED if out[r] & 0xFFF == 0x1E and 0 < out[r] >> 12 < 1 << 40]
        assert leaked, out
