"""The paging mode of a vCPU (SDM vol. 3A, 4.1.1)."""

from typing import Final

from pykvm.kvm import Struct

__all__ = ["paging_levels"]

_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_CR4_LA57: Final = 1 << 12
_EFER_LMA: Final = 1 << 10


def paging_levels(sregs: Struct) -> int:
    """Return the levels of the page tables: 4 or 5 in long mode, else 2, 3 (PAE), or 0 (none)."""
    if not sregs.cr0 & _CR0_PG:
        return 0
    if sregs.efer & _EFER_LMA:
        return 5 if sregs.cr4 & _CR4_LA57 else 4
    return 3 if sregs.cr4 & _CR4_PAE else 2
