"""Addresses of the crossing and of its contexts.

``*_GVA`` are guest virtual addresses, ``*_GPA`` guest physical ones; ``*_OFFSET`` are relative to
the start of the crossing area. Sizes are in bytes.
"""

from typing import Final

from pykvm.sizes import GIB, MIB

# ---- The crossing area: GVAs of the entry, gate, sub and return pages and what follows ----
# 2 MiB aligned, canonical with 4 and 5 levels, above 4 GiB. Its PML4, PDPT and PD indexes (0x5a,
# 0x133, 0x1a6) differ from each other and from the PT indexes of the crossing pages, so that no
# index finds an entry in a table page that is read one level too high or too low.
CROSSING_GVA: Final = 0x2D4C_F4C0_0000
CROSSING_ALIGN: Final = 2 * MIB  #: alignment of any other base
CROSSING_MIN_GVA: Final = 5 * GIB  #: keeps the gate's data too out of compatibility mode's reach

ENTRY_OFFSET: Final = 0x0000  #: entry page: default context, the guest's own, ends in VMFUNC
GATE_OFFSET: Final = 0x1000  #: gate page: gate context, executable
SUB_ENTRY_OFFSET: Final = 0x2000  #: sub entry page: sub context, executable
RETURN_OFFSET: Final = 0x3000  #: return page: default context, the guest's own
LIST_OFFSET: Final = 0x4000  #: EPTP list page of this vCPU: sub context, writable
ENV_OFFSET: Final = 0x6000  #: sub context, read-only: struct elisa_env
STACK_OFFSET: Final = 0x8000  #: stack of the sub context, lowest byte; nothing mapped around it
STACK_SIZE: Final = 0x4000
IMAGE_OFFSET: Final = 0x10000  #: the object's text, rodata, data and bss
IMAGE_MAX_SIZE: Final = 0xF0000
SHARED_OFFSET: Final = 0x200000  #: shared memory of the object, then window 0, window 1, ...

# The gate context maps its data far below the crossing base, where no displacement in the gate's
# code holds a byte that would decode as a write to memory (guest/crossing/gate.S).
GATE_LIST_OFFSET: Final = -0x3332_F000  #: EPTP list page of this vCPU: gate context, writable
GATE_DATA_OFFSET: Final = -0x3333_1000  #: gate context, read-only: official sub EPTP, 8 bytes

# ---- Private GPAs of gate and sub contexts: below 2^39, the physical address width of clients ----
PRIVATE_GPA_FIRST: Final = 256 * GIB  #: the guest's default context has nothing in the range
PRIVATE_GPA_END: Final = 512 * GIB
SUB_PRIVATE_GPA: Final = 0x40_0000_0000  #: the page at CROSSING_GVA + x lies at SUB_PRIVATE_GPA + x
GATE_PRIVATE_GPA: Final = 0x50_0000_0000  #: the same for the gate context
SUB_MEMORY_GPA: Final = 0x41_0000_0000  #: the object's memory in sub contexts, mapped by GiB
MAX_MEMORY: Final = 32 * GIB  #: of one object: shared memory and windows
PRIVATE_TABLES_OFFSET: Final = 0x100000  #: guest page tables of a context, relative to its base
PRIVATE_TABLES_SIZE: Final = 0x100000  #: 256 table pages
