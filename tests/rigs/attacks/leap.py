"""The guest program leap.c: VMFUNC from any address, with any registers, any CR3, any IDT."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from pykvm.elisa import crossing
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain.elf import ElfFile
from tests.rigs.sources import GUESTS

OWN_PAGES: Final = Access.READ | Access.WRITE | Access.EXECUTE


class Register(IntEnum):
    """Registers in the order in which the processor numbers them, then RFLAGS."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15
    RFLAGS = 16


# behind, cr3, idt, gdt, dr0, registers in, registers out, done
_LEAP: Final = struct.Struct(f"<5Q{len(Register)}Q{len(Register)}QQ")
_OUT: Final = 5 + len(Register)
FLAGS: Final = 0x4_0202  # interrupts enabled; AC suspends SMAP in the code that runs next


@dataclass(frozen=True)
class Leap:
    """One VMFUNC.

    Attributes:
        behind: address after the VMFUNC; 0 for an ordinary call.
        registers: values of registers before the VMFUNC.
        fill: value of the registers that `registers` does not name.

    The other fields are as in leap.c; 0 keeps the guest's own value.
    """

    behind: int = 0
    slot: int = 0
    registers: Mapping[Register, int] = field(default_factory=dict)
    fill: int = 0
    cr3: int = 0
    idt: int = 0
    gdt: int = 0
    dr0: int = 0

    def pack(self) -> bytes:
        values = [self.fill] * len(Register)
        values[Register.RAX] = self.fill >> 32 << 32  # EAX selects the VM function
        values[Register.RSP] = 0
        values[Register.RCX] = self.slot
        values[Register.RFLAGS] = FLAGS
        for register, value in self.registers.items():
            values[register] = value
        blank = [0] * len(Register)
        return _LEAP.pack(
            *(self.behind, self.cr3, self.idt, self.gdt, self.dr0), *values, *blank, 0
        )


@dataclass(frozen=True)
class Leaper:
    """Guest program leap.c."""

    leaps: Sequence[Leap] = ()

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "leap.c"])

    def params(self) -> list[int]:
        return []

    def input(self) -> bytes:
        return b"".join(leap.pack() for leap in self.leaps)


def give_leaps(guest: BareGuest, *leaps: Leap) -> None:
    """Set the leaps before the first run, and map pages of the guest's own where they start."""
    guest.set_input(Leaper(leaps).input())
    pages = set()
    for leap in leaps:
        if leap.behind:
            pages |= {(leap.behind - 3) // PAGE_SIZE, (leap.behind + 13) // PAGE_SIZE}
    own = {(crossing.CROSSING_GVA + crossing.RETURN_OFFSET) // PAGE_SIZE}
    own |= {crossing.CROSSING_GVA // PAGE_SIZE}
    for number, page in enumerate(sorted(pages)):
        assert page not in own, "a leap cannot start on the guest's entry or return page"
        gpa = layout.RX_LOG_GPA + number * PAGE_SIZE
        guest.map(page * PAGE_SIZE, gpa, PAGE_SIZE, OWN_PAGES)


def left(guest: BareGuest) -> list[dict[Register, int] | None]:
    """Return the registers after each leap; None for one that has not come back."""
    data = guest.memory.read(guest.info.input, guest.info.input_size)
    found: list[dict[Register, int] | None] = []
    for values in _LEAP.iter_unpack(data):
        out = dict(zip(Register, values[_OUT:-1], strict=True))
        found.append(out if values[-1] else None)
    return found
