"""Exceptions in trusted code, with handlers and descriptors that the guest has written."""

import struct

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import HUGE_2M
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.leap import FLAGS, Leap, Leaper, Register
from tests.rigs.attacks.victim import SHARED, WINDOW, WINDOW_PAGES, C

# Offsets in the window, which guest and sub context map at the same address.
IDT_AT, GDT_AT, STACK_AT = PAGE_SIZE, 2 * PAGE_SIZE, 7 * PAGE_SIZE
DEBUG, INVALID_OPCODE = 1, 6
PAGE_FAULT, GENERAL_PROTECTION = 14, 13
CODE_SELECTOR = 0x08
INTERRUPT_GATE, TRAP_GATE = 0x8E, 0x8F  # a trap gate leaves interrupts enabled

ACROSS_THE_END = "across the end of the windows"
BAD_POINTERS = {
    "null": 0,
    "the guest's memory": layout.IMAGE_GPA,
    "behind the windows' large page": SHARED + HUGE_2M,
    ACROSS_THE_END: WINDOW + 2 * WINDOW_PAGES * PAGE_SIZE - 4,
    "not canonical": 1 << 62,
}


def handler(address: int, kind: int = INTERRUPT_GATE) -> bytes:
    """Return an entry of an IDT (SDM vol. 3A 6.14.1)."""
    low, middle, high = address & 0xFFFF, address >> 16 & 0xFFFF, address >> 32
    return struct.pack("<HHBBHII", low, CODE_SELECTOR, 0, kind, middle, high, 0)


def descriptors_in_window(
    guest: BareGuest, instance: ObjectInstance, handlers: dict[int, int]
) -> None:
    """Write an IDT and a GDT into the window and map it where the sub context has it.

    In the default context an invalid opcode, which VMFUNC may be, leads back to the guest.
    """
    guest.map(WINDOW, layout.WINDOW_GPA, WINDOW_PAGES * PAGE_SIZE, Access.READ | Access.WRITE)
    back = Leaper().image().address_of("leap_back")
    window = instance.window(0)
    for vector, address in {INVALID_OPCODE: back, **handlers}.items():
        at = IDT_AT + 16 * vector
        window[at : at + 16] = handler(address)
    gdt = guest.memory.read(layout.GDT_GPA, 64)
    window[GDT_AT : GDT_AT + len(gdt)] = gdt


def hijack(guest: BareGuest, instance: ObjectInstance, slot: int, **how: int) -> Leap:
    """Return a call that takes a debug exception inside the object.

    The handler is an internal function of the object. Its arguments are the guest's, and its stack
    is in the window.
    """
    descriptors_in_window(guest, instance, {DEBUG: C + instance.symbols["vault_copy"]})
    return Leap(
        slot=slot,
        registers={
            Register.RDI: WINDOW,
            Register.RSI: SHARED,
            Register.RSP: WINDOW + STACK_AT,
            Register.RFLAGS: FLAGS | how.pop("flags", 0),
        },
        idt=WINDOW + IDT_AT,
        gdt=WINDOW + GDT_AT,
        **how,
    )


def breakpoints(instance: ObjectInstance) -> dict[str, int]:
    """Return addresses in the sub context at which to set breakpoints."""
    return {
        "sub entry": C + crossing.SUB_ENTRY_OFFSET,
        "object": C + instance.symbols["elisa_serve"],
        "return": C + instance.symbols["serve"] + 5,
    }
