"""CPUID leaves as KVM takes and gives them (struct kvm_cpuid_entry2).

Source: Documentation/virt/kvm/api.rst 4.46 and 4.47; SDM vol. 2A, CPUID.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pykvm.kvm.errors import IoctlError
from pykvm.kvm.native import Struct, ffi, lib

__all__ = ["CpuidEntry", "find_leaf", "pack_cpuid", "read_cpuid"]


@dataclass(slots=True)
class CpuidEntry:
    """One leaf of CPUID.

    Attributes:
        function: EAX of the instruction.
        index: ECX of the instruction; it counts only where the flags say so.
        flags: ``KVM_CPUID_FLAG_*``.
        eax: the first register of the result.
        ebx: the second.
        ecx: the third.
        edx: the fourth.
    """

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def __str__(self) -> str:
        return (
            f"{self.function:#010x}.{self.index:x} eax={self.eax:08x} ebx={self.ebx:08x} "
            f"ecx={self.ecx:08x} edx={self.edx:08x}"
        )


_FIELDS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_FIRST_GUESS = 64
_LIMIT = 4096


def read_cpuid(call: Callable[[Struct], int]) -> list[CpuidEntry]:
    """Make a call that fills a struct kvm_cpuid2, with as many entries as it turns out to need."""

    def attempt(size: int) -> Struct | None:
        table = ffi.new("struct kvm_cpuid2 *", {"nent": size, "entries": size})
        try:
            call(table)
        except IoctlError as error:
            # E2BIG: too few entries; the kernel does not say how many there are.
            if error.errno != errno.E2BIG or size >= _LIMIT:
                raise
            return None
        return table

    too_few, size = -1, _FIRST_GUESS
    while (table := attempt(size)) is None:
        too_few, size = size, size * 2
    if table.nent == size:
        # Linux 6.1's KVM_GET_CPUID2 leaves nent as it was, with zeros after the last entry: the
        # number of entries is the smallest size that is not refused.
        while size - too_few > 1:
            middle = (too_few + size) // 2
            smaller = attempt(middle)
            if smaller is None:
                too_few = middle
            else:
                table, size = smaller, middle
    return [
        CpuidEntry(*(getattr(table.entries[i], field) for field in _FIELDS))
        for i in range(table.nent)
    ]


def pack_cpuid(entries: Iterable[CpuidEntry]) -> Struct:
    """Return a struct kvm_cpuid2 for KVM_SET_CPUID2."""
    entries = list(entries)
    table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": len(entries)})
    for slot, entry in enumerate(entries):
        for field in _FIELDS:
            setattr(table.entries[slot], field, getattr(entry, field))
    return table


def find_leaf(entries: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry | None:
    """Return the leaf that CPUID(eax=function, ecx=index) would read, or None."""
    for entry in entries:
        if entry.function == function and (
            entry.index == index or not entry.flags & lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        ):
            return entry
    return None
