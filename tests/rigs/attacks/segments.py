"""The guest program segments.c: VMFUNC in compatibility mode and at CPL 3."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain.elf import ElfFile
from tests.rigs.sources import GUESTS

VMFUNC: Final = b"\x0f\x01\xd4"
INT_0X80: Final = b"\xcd\x80"
LOW: Final = 1 << 32  # end of the addresses that 32-bit code reaches

# target, slot, code, data, rsp, result, done, faulted, rip, left
_JUMP: Final = struct.Struct("<10Q")
RSP: Final = layout.STACK_GPA + 0x8000


class Segments(Enum):
    """Selectors of code and data, as in segments.c."""

    KERNEL = (0x08, 0x10)
    NARROW_KERNEL = (0x28, 0x10)
    NARROW_USER = (0x33, 0x3B)
    USER = (0x43, 0x3B)

    @property
    def user(self) -> bool:
        return self.value[0] & 3 == 3

    @property
    def narrow(self) -> bool:
        return "NARROW" in self.name


@dataclass(frozen=True)
class Jump:
    """A jump to code that runs VMFUNC(0, slot) and then INT $0x80.

    Attributes:
        behind: address after the VMFUNC. With narrow segments it is below 4 GiB, and 0 means the
            end of that range.
    """

    segments: Segments
    behind: int
    slot: int

    @property
    def target(self) -> int:
        return (self.behind - len(VMFUNC)) % (LOW if self.segments.narrow else 1 << 64)

    def pack(self) -> bytes:
        return _JUMP.pack(self.target, self.slot, *self.segments.value, RSP, *bytes(5))


@dataclass(frozen=True)
class Jumper:
    """Guest program segments.c."""

    jumps: Sequence[Jump] = ()

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "segments.c"])

    def params(self) -> list[int]:
        return []

    def input(self) -> bytes:
        return b"".join(jump.pack() for jump in self.jumps)


def give_jumps(guest: BareGuest, *jumps: Jump, landing: int | None = None) -> None:
    """Set the jumps before the first run, and map the guest's own pages for them.

    Each page gets the privilege level of the first jump that needs it.

    Args:
        landing: address to which calls return, if it is not the one after their VMFUNC.
    """
    guest.set_input(Jumper(jumps).input())
    pages: dict[int, tuple[bytearray, bool]] = {}

    def lay(address: int, code: bytes, user: bool) -> None:
        for at, byte in enumerate(code, address):
            blank = (bytearray(b"\xcc" * PAGE_SIZE), user)
            page, for_user = pages.setdefault(at // PAGE_SIZE, blank)
            assert for_user == user, f"{at:#x} is needed at two privilege levels"
            page[at % PAGE_SIZE] = byte

    for jump in jumps:
        lay(jump.target, VMFUNC, jump.segments.user)
        if jump.behind:
            lay(jump.behind, INT_0X80, jump.segments.user)
    if landing is not None:
        lay(landing, INT_0X80, jumps[0].segments.user)
    for number, (page, (data, user)) in enumerate(sorted(pages.items())):
        gpa = layout.RX_LOG_GPA + number * PAGE_SIZE
        guest.memory.write(gpa, bytes(data))
        access = Access.READ | Access.EXECUTE | (Access.USER if user else Access(0))
        guest.map(page * PAGE_SIZE, gpa, PAGE_SIZE, access)


def landed(guest: BareGuest) -> list[int | None]:
    """Return RAX after each jump; None for one that has not come back."""
    return [result if done else None for *_, result, done, _, _, _ in _jumps(guest)]


@dataclass(frozen=True)
class Invalid:
    """An invalid opcode that ended a jump.

    Attributes:
        rip: address of the instruction.
        left: all registers but RSP, one over the other.
    """

    rip: int
    left: int


def invalid(guest: BareGuest) -> list[Invalid | None]:
    """Return the invalid opcode that ended each jump; None where INT $0x80 did, or nothing yet."""
    ends = ((faulted, Invalid(rip, left)) for *_, faulted, rip, left in _jumps(guest))
    return [end if faulted else None for faulted, end in ends]


def _jumps(guest: BareGuest) -> Iterator[tuple[int, ...]]:
    data = guest.memory.read(guest.info.input, guest.info.input_size)
    return _JUMP.iter_unpack(data)
