"""A bare-metal guest's program in its memory, and the page tables that map both."""

from typing import Final

from pykvm.machine.bare import layout
from pykvm.machine.bare.failures import ImageAddressError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.paging.entries import SIZE_2M, Access, X86Entry
from pykvm.paging.tables import PageTables
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain import elf
from pykvm.toolchain.elf import ElfFile

__all__ = ["load_image", "map_ram"]

_READ: Final = Access.READ
_READ_WRITE: Final = Access.READ | Access.WRITE


def load_image(memory: GuestMemory, image: ElfFile) -> None:
    """Write a program's segments into the guest's memory.

    Raises:
        ImageAddressError: a segment lies outside the area for programs.
    """
    for segment in image.segments:
        end = segment.address + segment.size
        if segment.address < layout.IMAGE_GPA or end > layout.IMAGE_END_GPA:
            raise ImageAddressError(
                f"segment {segment.address:#x}-{end:#x} of the image",
                f"link it between {layout.IMAGE_GPA:#x} and {layout.IMAGE_END_GPA:#x}",
            )
        memory.write(segment.address, segment.data)


def map_ram(tables: PageTables[X86Entry], memory: GuestMemory, image: ElfFile) -> None:
    """Map all RAM except page 0 at GVA = GPA.

    Pages of the program have the access of their segment; all others are writable.
    """
    first = layout.NULL_PAGE_GPA + PAGE_SIZE
    tables.map(first, first, layout.IMAGE_GPA - first, _READ_WRITE)
    for segment in image.segments:
        access = _READ
        access |= Access.WRITE if segment.flags & elf.PF_W else 0
        access |= Access.EXECUTE if segment.flags & elf.PF_X else 0
        size = -(-segment.size // PAGE_SIZE) * PAGE_SIZE
        tables.map(segment.address, segment.address, size, access)
    first = layout.IMAGE_END_GPA
    tables.map(first, first, memory.size - first, _READ_WRITE, max_page=SIZE_2M)
    tables.store(memory.write)
