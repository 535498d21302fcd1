"""Leaps into the vault, honest and not, and how they end."""

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
    """To the vault's internal function, with arguments that make it copy the secret into the
    window, and a stack there that leads home through the sub entry page's own last instructions."""
    home = C + instance.symbols["serve"] + 5  # behind the call: pop %rsp and on
    put(instance.window(0), 0x1000, home)
    put(instance.window(0), 0x1008, layout.STACK_GPA + 0x800)
    return Leap(
        C + instance.symbols["vault_copy"],
        slot,
        {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RSP: WINDOW + 0x1000},
    )


def home_stack(guest: BareGuest) -> None:
    """Where `copy_secret` ends: a return address on the guest's own stack."""
    back = Leaper().image().address_of("leap_back")
    guest.memory.write(layout.STACK_GPA + 0x800, back.to_bytes(8, "little"))


def failed(exits: list[Exit]) -> list[tuple[int, int]]:
    """Function and index of each VMFUNC that the VMM was told of; there was nothing else."""
    told = []
    for exit in exits:
        assert isinstance(exit, ElisaExit), exit
        assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, AT_DEFAULT), exit
        told.append((exit.function, exit.index))
    return told
