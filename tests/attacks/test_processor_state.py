"""T14: segment bases, MXCSR, x87 and CR0, which a guest carries into trusted code."""

import struct
from collections.abc import Callable

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.edits import BY_GS, BY_SSE, UNCHECKED
from tests.rigs.attacks.leap import FLAGS, Leap, Register, give_leaps, left
from tests.rigs.attacks.vault_calls import LETTER, LETTER_AT, opens, post
from tests.rigs.attacks.victim import (
    KNOCK,
    SECRET,
    SHARED,
    VAULT,
    join,
    still_serves,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import Edit, edited_object
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

TASK_SWITCHED, EMULATION = 1 << 3, 1 << 2  # bits of CR0
OSFXSR, OSXMMEXCPT = 1 << 9, 1 << 10  # bits of CR4
ROUND_UP = 2 << 13  # rounding control of MXCSR
MXCSR_AT, XMM0_AT, XSTATE_AT = 24, 160, 512  # offsets in the XSAVE area (SDM vol. 1, 13.4)
ODD_MXCSR = 0xE040  # all exceptions unmasked, towards zero, denormals are zero, flush to zero


def segment_bases(guest: BareGuest) -> None:
    """Point GS at the sub context's shared memory and FS at nothing."""
    sregs = guest.vcpu.get_sregs()
    sregs.gs.base, sregs.fs.base = SHARED, 0x7F00_DEAD_B000
    guest.vcpu.set_sregs(sregs)


def vectors(guest: BareGuest, mxcsr: int = ODD_MXCSR) -> None:
    """Set MXCSR, and fill the x87 stack, with all exceptions unmasked and one pending."""
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 |= OSFXSR | OSXMMEXCPT
    guest.vcpu.set_sregs(sregs)
    area = bytearray(guest.vcpu.get_xsave())
    struct.pack_into("<HHB", area, 0, 0x40, 0x8081, 0xFF)
    struct.pack_into("<I", area, MXCSR_AT, mxcsr)
    area[XSTATE_AT] |= 3  # XSTATE_BV: x87 and SSE state are valid
    guest.vcpu.set_xsave(bytes(area))


def use_vectors(guest: BareGuest) -> None:
    """Fill a vector register. While all are in their initial state, Bochs 3.0 does not load MXCSR,
    which then has the host's flags."""
    area = bytearray(guest.vcpu.get_xsave())
    area[XMM0_AT] = 1
    area[XSTATE_AT] |= 3
    guest.vcpu.set_xsave(bytes(area))


def control_words(guest: BareGuest) -> tuple[int, ...]:
    """Return FCW, FSW, FTW and MXCSR, which KVM_GET_FPU leaves out."""
    area = guest.vcpu.get_xsave()
    return *struct.unpack_from("<HHB", area), *struct.unpack_from("<I", area, MXCSR_AT)


def no_coprocessor(guest: BareGuest) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.cr0 |= TASK_SWITCHED | EMULATION
    guest.vcpu.set_sregs(sregs)


STATES: dict[str, Callable[[BareGuest], None]] = {
    "segment bases": segment_bases,
    "MXCSR and x87": vectors,
    "CR0.TS and CR0.EM": no_coprocessor,
}


@pytest.mark.attack("T14")
@pytest.mark.parametrize("name", STATES)
def test_state_that_trusted_code_has_no_use_for(kvm: Kvm, guest: BareGuest, name: str) -> None:
    """Trusted code works in any such state, and the guest finds its own state on the return."""
    with vault() as instance:
        slot = join(guest, instance).slot
        use_vectors(guest)
        STATES[name](guest)
        assert (ODD_MXCSR in control_words(guest)) == (STATES[name] is vectors)
        instance.window(0)[:LETTER] = bytes(range(1, LETTER + 1))
        give_leaps(guest, post(slot, FLAGS), opens(slot, 0))
        before = control_words(guest), guest.vcpu.get_sregs()
        assert run(guest) == []
        assert [out and out[Register.RAX] for out in left(guest)] == [0, 2**64 - 1]  # EPERM
        letter = instance.shared[LETTER_AT : LETTER_AT + LETTER]
        assert bytes(letter) == bytes(range(1, LETTER + 1))
        letter[:] = bytes(LETTER)
        after = control_words(guest), guest.vcpu.get_sregs()
        assert after[0] == before[0]
        assert (after[1].gs.base, after[1].fs.base) == (before[1].gs.base, before[1].fs.base)
        assert after[1].cr0 == before[1].cr0
        assert untouched(instance)
        assert still_serves(kvm, instance)


def knock(guest: BareGuest, edit: Edit, state: Callable[[BareGuest], None]) -> int | None:
    """Return a knock's result in that state, from an object that the toolchain would refuse."""
    with vault(edited_object(VAULT, edit, without=UNCHECKED)) as instance:
        slot = join(guest, instance).slot
        state(guest)
        give_leaps(guest, Leap(slot=slot, registers={Register.RDI: KNOCK}))
        assert run(guest) == []
        (out,) = left(guest)
        return None if out is None else out[Register.RAX]


@pytest.mark.control("T14")
def test_an_object_that_uses_gs_reads_where_the_guest_says(guest: BareGuest) -> None:
    assert knock(guest, BY_GS, segment_bases) == SECRET


@pytest.mark.control("T14")
@pytest.mark.parametrize(("mxcsr", "result"), [(0x1F80, 0), (0x1F80 | ROUND_UP, 1)])
def test_an_object_that_computes_rounds_as_the_guest_says(
    guest: BareGuest, mxcsr: int, result: int
) -> None:
    assert knock(guest, BY_SSE, lambda guest: vectors(guest, mxcsr)) == result
