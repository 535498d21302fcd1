"""Honest and dishonest leaps into the vault, and their results."""

from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Exit
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.leap import Leap, Leaper, Register
from tests.rigs.attacks.victim import AT_DEFAULT, NOTE, OPEN, POST, SHARED, WINDOW, C, put

LETTER = 24  # bytes; backwards from its first byte they reach the vault's word
LETTER_AT = 64


def post(slot: int, flags: int) -> Leap:
    return Leap(
        slot=slot,
        registers={Register.RDI: POST, Register.RSI: LETTER, Register.RFLAGS: flags},
    )


def opens(slot: int, key: int) -> Leap:
    return Leap(slot=slot, registers={Register.RDI: OPEN, Register.RSI: key})


def note(slot: int, index: int, value: int) -> Leap:
    return Leap(
        slot=slot,
        registers={Register.RDI: NOTE, Register.RSI: index, Register.RDX: value},
    )


def copy_secret(instance: ObjectInstance, slot: int) -> Leap:
    """Return a leap to the vault's internal function that copies the secret into the window.

    The stack is in the window too. It returns through the last instructions of the sub entry page.
    """
    home = C + instance.symbols["serve"] + 5  # after the call instruction, at pop %rsp
    put(instance.window(0), 0x1000, home)
    put(instance.window(0), 0x1008, layout.STACK_GPA + 0x800)
    return Leap(
        C + instance.symbols["vault_copy"],
        slot,
        {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RSP: WINDOW + 0x1000},
    )


def home_stack(guest: BareGuest) -> None:
    """Put a return address on the guest's own stack, where `copy_secret` ends."""
    back = Leaper().image().address_of("leap_back")
    guest.memory.write(layout.STACK_GPA + 0x800, back.to_bytes(8, "little"))


def failed(exits: list[Exit]) -> list[tuple[int, int]]:
    """Return function and index of each VMFUNC reported to the VMM; fail on any other exit."""
    told = []
    for exit in exits:
        assert isinstance(exit, ElisaExit), exit
        assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, AT_DEFAULT), exit
        told.append((exit.function, exit.index))
    return told
