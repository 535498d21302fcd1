"""T9, T10, controls: exceptions in trusted code without the kernel's defences.

They lead a guest to internal code that no entry reaches.
"""

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.exceptions import (
    ACROSS_THE_END,
    BAD_POINTERS,
    GDT_AT,
    GENERAL_PROTECTION,
    IDT_AT,
    PAGE_FAULT,
    breakpoints,
    descriptors_in_window,
    hijack,
)
from tests.rigs.attacks.leap import Leap, Register, give_leaps
from tests.rigs.attacks.objects import FAULTY_DECLARATION
from tests.rigs.attacks.victim import SECRET, SHARED, WINDOW, C, join, put, stolen, vault
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa


@pytest.mark.weakened
@pytest.mark.control("T9")
@pytest.mark.parametrize("where", ["sub entry", "object"])
def test_a_breakpoint_runs_internal_code(guest: BareGuest, where: str) -> None:
    """The guest, which has its handler in the sub context, receives the debug exception.

    At these places the registers still hold the guest's values.
    """
    with weakened(Weaken.TABLES | Weaken.EXITS | Weaken.EVENTS), vault() as instance:
        slot = join(guest, instance).slot
        give_leaps(guest, hijack(guest, instance, slot, dr0=breakpoints(instance)[where]))
        run(guest)  # the handler returns to the breakpoint until the stack is used up
        assert stolen(instance)


@pytest.mark.weakened
@pytest.mark.control("T10")
@pytest.mark.parametrize("name", [name for name in BAD_POINTERS if name != ACROSS_THE_END])
def test_a_fault_runs_internal_code(guest: BareGuest, name: str) -> None:
    """The processor delivers the fault by itself, without an exit.

    Behind the windows' end, but within their large page, there is a violation of the EPT instead.
    """
    with weakened(Weaken.TABLES), FAULTY_DECLARATION.open() as instance:
        put(instance.shared, 0, SECRET)
        slot = join(guest, instance).slot
        give_leaps(guest, fault(guest, instance, slot, BAD_POINTERS[name]))
        run(guest)  # the handler returns to an error code
        assert stolen(instance)


def fault(guest: BareGuest, instance: ObjectInstance, slot: int, pointer: int) -> Leap:
    """Return a call with a bad pointer; its handlers are internal code of the object."""
    vectors = dict.fromkeys((PAGE_FAULT, GENERAL_PROTECTION), C + instance.symbols["vault_copy"])
    descriptors_in_window(guest, instance, vectors)
    registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RDX: pointer}
    return Leap(slot=slot, registers=registers, idt=WINDOW + IDT_AT, gdt=WINDOW + GDT_AT)
