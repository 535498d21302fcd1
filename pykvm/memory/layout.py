"""Named guest addresses: nothing here but constants, one line each.

`*_GPA` are guest physical, `*_GVA` guest virtual addresses, `*_OFFSET` are relative to the start
of the crossing area. Sizes are bytes.
"""

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# ---- A bare-metal guest: 64-bit, GVA = GPA for all of it, 4-level paging ----
NULL_PAGE_GPA: Final = 0x0  # stays unmapped, so that a null pointer faults
PAGE_TABLES_GPA: Final = 0x1000  # the guest's own page tables, PML4 first
PAGE_TABLES_SIZE: Final = 0x3F000  # 63 table pages
GDT_GPA: Final = 0x40000  # global descriptor table, one page
IDT_GPA: Final = 0x41000  # interrupt descriptor table, one page
TSS_GPA: Final = 0x42000  # task state segment, one page
BOOT_INFO_GPA: Final = 0x43000  # what the VMM tells the guest, one page
ENTRY_PAGE_GPA: Final = 0x48000  # the guest's entry page, mapped at CROSSING_GVA
RETURN_PAGE_GPA: Final = 0x49000  # the guest's return page, mapped at CROSSING_GVA + 0x3000
STACK_GPA: Final = 0x50000  # lowest byte of the boot stack
STACK_TOP_GPA: Final = 0x90000  # initial RSP: one past the boot stack
IMAGE_GPA: Final = 1 * MIB  # the guest program, text first
IMAGE_END_GPA: Final = 16 * MIB  # one past the room for program, data and bss
CAPTURE_GPA: Final = 16 * MIB  # frames to send, put there by the VMM
CAPTURE_SIZE: Final = 16 * MIB
RX_LOG_GPA: Final = 32 * MIB  # frames received, read by the VMM afterwards
RX_LOG_SIZE: Final = 32 * MIB
RAM_SIZE: Final = 64 * MIB  # default memory of a bare-metal guest, from GPA 0
WINDOW_GPA: Final = 4 * GIB  # the guest's window of attachment 0, in the default context
WINDOW_STRIDE: Final = 1 * GIB  # window of attachment n: WINDOW_GPA + n * WINDOW_STRIDE
DIRECT_GPA: Final = 64 * GIB  # an object's whole memory, for the directly mapped baseline
RAM_LIMIT_GPA: Final = 128 * GIB  # a guest's memory and devices end below this

# ---- What KVM wants for itself (Linux Documentation/virt/kvm/api.rst) ----
IDENTITY_MAP_GPA: Final = 0xFFFBC000  # KVM_SET_IDENTITY_MAP_ADDR, one page
KVM_TSS_GPA: Final = 0xFFFBD000  # KVM_SET_TSS_ADDR, three pages

# ---- The crossing area: GVAs of the entry, gate, sub and return pages and what follows ----
# 2 MiB aligned, canonical with 4 and 5 levels, above 4 GiB. Its PML4, PDPT and PD indexes (0x5a,
# 0x133, 0x1a6) differ from each other and from the PT indexes of the crossing pages, so that no
# index finds an entry in a table page that is read one level too high or too low.
CROSSING_GVA: Final = 0x2D4C_F4C0_0000
CROSSING_ALIGN: Final = 2 * MIB  # any other base has to be aligned so
CROSSING_MIN_GVA: Final = 5 * GIB  # the gate's data as well is out of compatibility mode's reach

ENTRY_OFFSET: Final = 0x0000  # entry page: default context, the guest's own, ends in VMFUNC
GATE_OFFSET: Final = 0x1000  # gate page: gate context, executable
SUB_ENTRY_OFFSET: Final = 0x2000  # sub entry page: sub context, executable
RETURN_OFFSET: Final = 0x3000  # return page: default context, the guest's own
LIST_OFFSET: Final = 0x4000  # EPTP list page of this vCPU: sub context, writable
ENV_OFFSET: Final = 0x6000  # sub context, read-only: struct elisa_env
STACK_OFFSET: Final = 0x8000  # stack of the sub context, lowest byte; nothing mapped around it
STACK_SIZE: Final = 0x4000
IMAGE_OFFSET: Final = 0x10000  # the object's text, rodata, data and bss
IMAGE_MAX_SIZE: Final = 0xF0000
SHARED_OFFSET: Final = 0x200000  # shared memory of the object, then window 0, window 1, ...
SHARED_ALIGN: Final = 2 * MIB

# The gate context maps its data far below the crossing base, where no displacement in the gate's
# code holds a byte that would decode as a write to memory (guest/crossing/gate.S).
GATE_LIST_OFFSET: Final = -0x3332_F000  # EPTP list page of this vCPU: gate context, writable
GATE_DATA_OFFSET: Final = -0x3333_1000  # gate context, read-only: official sub EPTP, 8 bytes

# ---- Private GPAs of gate and sub contexts: below 2^39, the physical address width of clients ----
PRIVATE_GPA_FIRST: Final = 256 * GIB  # the guest's default context has nothing in the range
PRIVATE_GPA_END: Final = 512 * GIB
SUB_PRIVATE_GPA: Final = 0x40_0000_0000  # the page at CROSSING_GVA + x lies at SUB_PRIVATE_GPA + x
GATE_PRIVATE_GPA: Final = 0x50_0000_0000  # the same for the gate context
PRIVATE_TABLES_OFFSET: Final = 0x100000  # guest page tables of a context, relative to its base
PRIVATE_TABLES_SIZE: Final = 0x100000  # 256 table pages, ends where the shared memory begins
