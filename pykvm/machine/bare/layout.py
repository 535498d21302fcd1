"""RAM and devices of a bare-metal guest: constants, one line each.

`*_GPA` are guest physical addresses, sizes are bytes. Everything except page 0 is mapped at
GVA = GPA.
"""

from typing import Final

from pykvm.sizes import GIB, MIB

NULL_PAGE_GPA: Final = 0x0  # stays unmapped, so that a null pointer faults
PAGE_TABLES_GPA: Final = 0x1000  # the guest's own page tables, PML4 first
PAGE_TABLES_SIZE: Final = 0x3F000  # 63 table pages
GDT_GPA: Final = 0x40000  # global descriptor table, one page
IDT_GPA: Final = 0x41000  # interrupt descriptor table, one page
TSS_GPA: Final = 0x42000  # task state segment, one page, the same for all vCPUs
BOOT_INFO_GPA: Final = 0x43000  # information for the guest (boot_info.py), one page
ENTRY_PAGE_GPA: Final = 0x48000  # the guest's entry page, mapped at CROSSING_GVA
RETURN_PAGE_GPA: Final = 0x49000  # the guest's return page, mapped at CROSSING_GVA + 0x3000
STACK_GPA: Final = 0x50000  # lowest byte of the boot stacks
STACK_TOP_GPA: Final = 0x90000  # initial RSP of vCPU 0: one past the boot stacks
STACK_SIZE: Final = 0x8000  # boot stack of each vCPU; that of vCPU n is the n-th from the top
MAX_VCPUS: Final = (STACK_TOP_GPA - STACK_GPA) // STACK_SIZE  # 8
IMAGE_GPA: Final = 1 * MIB  # the guest program, text first
IMAGE_END_GPA: Final = 16 * MIB  # one past the room for program, data and bss
CAPTURE_GPA: Final = 16 * MIB  # frames to send, put there by the VMM
CAPTURE_SIZE: Final = 16 * MIB
RX_LOG_GPA: Final = 32 * MIB  # frames received, read by the VMM afterwards
RX_LOG_SIZE: Final = 28 * MIB
SAMPLES_GPA: Final = 60 * MIB  # measurements, read by the VMM afterwards
SAMPLES_SIZE: Final = 4 * MIB
RAM_SIZE: Final = 64 * MIB  # default memory of a bare-metal guest, from GPA 0
WINDOW_GPA: Final = 4 * GIB  # the guest's window of attachment 0, in the default context
WINDOW_STRIDE: Final = 1 * GIB  # window of attachment n: WINDOW_GPA + n * WINDOW_STRIDE
DIRECT_GPA: Final = 64 * GIB  # an object's whole memory, for the directly mapped baseline
RAM_LIMIT_GPA: Final = 128 * GIB  # a guest's memory and devices end below this


def stack_top(number: int) -> int:
    """Return the initial RSP of a vCPU: one past its boot stack."""
    return STACK_TOP_GPA - number * STACK_SIZE
