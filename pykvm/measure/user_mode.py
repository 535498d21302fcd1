"""The bare-metal guest program ``user.c``, which calls objects from user mode (CPL 3).

Its kernel runs as in other guests. A page of code, a page of data and the guest's own pages of the
crossing are also mapped for user mode.
"""

import struct
from dataclasses import dataclass
from typing import Final

from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain.elf import ElfFile

__all__ = ["UserProgram", "map_user_pages", "user_samples"]

_CODE_GVA: Final = 0x10_0000_0000
_DATA_GVA: Final = 0x10_0010_0000
_CALL: Final = 6  # the parameter that names elisa_call
_READ_EXECUTE: Final = Access.READ | Access.EXECUTE | Access.USER
_READ_WRITE: Final = Access.READ | Access.WRITE | Access.USER


@dataclass(frozen=True)
class UserProgram:
    """Parameters of ``user.c``.

    Its results are the number of unusual calls that returned, and the result of the last one.

    Attributes:
        calls: number of calls to make with unusual values in every register and flag.
        timed: number of calls to time after these, one by one.
        alignment: whether CR0.AM and RFLAGS.AC are on.
        odd_stack: whether rsp is odd.
        argument: first argument of the unusual calls.
    """

    calls: int = 0
    timed: int = 0
    alignment: bool = False
    odd_stack: bool = False
    argument: int = 0

    def image(self) -> ElfFile:
        return build_guest(["user.c", "user_mode.S"])

    def params(self) -> list[int]:
        how = int(self.alignment) | int(self.odd_stack) << 1
        return [self.calls, self.timed, _CODE_GVA, _DATA_GVA, how, self.argument]

    def input(self) -> bytes:
        return bytes(PAGE_SIZE)


def map_user_pages(guest: BareGuest, program: UserProgram) -> None:
    """Map the program's user pages, and pass it the entry page of the attached object."""
    guest.map(_CODE_GVA, program.image().address_of("user_page"), PAGE_SIZE, _READ_EXECUTE)
    guest.map(_DATA_GVA, guest.info.input, PAGE_SIZE, _READ_WRITE)
    # Not in info.elisa_call: the runtime would access the pages from kernel mode.
    guest.info.param[_CALL] = guest.elisa_call


def user_samples(samples: bytes | memoryview, timed: int) -> tuple[list[int], list[int]]:
    """Decode the measurements of ``user.c``.

    Args:
        samples: measurements that the guest left.
        timed: number of timed calls.

    Returns:
        Ticks of the time-stamp counter for each empty measurement, and for each timed call.
    """
    ticks = struct.unpack_from(f"<{2 * timed}Q", samples)
    return list(ticks[:timed]), list(ticks[timed:])
