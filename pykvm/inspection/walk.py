"""A guest's own page tables for a virtual address, level by level, for a person to read.

::

    cr3 0x1000: 4 levels
    level 4 table 0x1000[0x0]: 0x2027 -> table 0x2000 [rwxu] accessed
    level 3 table 0x2000[0x0]: 0x3027 -> table 0x3000 [rwxu] accessed
    level 2 table 0x3000[0x0]: 0xe7 -> 0x0 [rwxu 2M WB] accessed dirty
    GVA 0x10000 -> GPA 0x10000 [rwxu 2M WB]

Source: SDM vol. 3A, 4.5 (4-level and 5-level paging), 12.12.2 (IA32_PAT).
"""

from __future__ import annotations

import struct
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.paging_mode import paging_levels
from pykvm.kvm import Vcpu
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import AddressError
from pykvm.paging.entries import ENTRIES, X86Entry, page_size, size_name
from pykvm.paging.walk import Step, walk
from pykvm.sizes import PAGE_SIZE

__all__ = ["WalkAddressError", "describe_walk", "parse_address"]

_IA32_PAT: Final = 0x277
_PAT_TYPES: Final = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}

_FLAGS: Final = (
    ("global", X86Entry.is_global),
    ("accessed", X86Entry.accessed),
    ("dirty", X86Entry.dirty),
)


class WalkAddressError(PykvmError, ValueError):
    """Text that is no address."""


def parse_address(text: str) -> int:
    """Return the virtual address that a user typed: decimal, or hexadecimal after 0x.

    Raises:
        WalkAddressError: it is none, or has more than 64 bits.
    """
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if not 0 <= address < 1 << 64:
        raise WalkAddressError(f"{text!r} is no address", "give one such as 0xffffffff81000000")
    return address


def describe_walk(vcpu: Vcpu, memory: GuestMemory, address: int) -> str:
    """Return the walk of a virtual address, several lines.

    Tables of 32-bit and PAE paging are not shown level by level.

    Args:
        vcpu: a paused vCPU, whose CR3 counts.
        memory: the guest's memory.
        address: guest virtual address, below 2^64.

    Raises:
        KvmError: see `Vcpu.get_sregs`.
    """
    sregs = vcpu.get_sregs()
    levels = paging_levels(sregs)
    if not levels:
        return f"no paging\nGVA {address:#x} -> GPA {address:#x}"
    if levels < 4:
        found = vcpu.translate_gva(address)
        kind = "PAE" if levels == 3 else "32-bit"
        target = "nothing" if found is None else f"GPA {found.physical:#x}"
        return f"cr3 {sregs.cr3:#x}: {kind} paging\nGVA {address:#x} -> {target}"
    return "\n".join(_long_mode(sregs.cr3, levels, _pat(vcpu), memory, address))


def _long_mode(
    cr3: int, levels: int, pat: tuple[str, ...], memory: GuestMemory, address: int
) -> list[str]:
    missing: list[int] = []

    def read(table: int) -> tuple[int, ...]:
        try:
            return struct.unpack(f"<{ENTRIES}Q", memory.read(table, PAGE_SIZE))
        except AddressError:
            missing.append(table)
            return (0,) * ENTRIES  # ends the walk

    found = walk(cr3, address, X86Entry, read, levels=levels)
    lines = [f"cr3 {cr3:#x}: {levels} levels"]
    lines += [_line(step, pat) for step in found.steps if step.table not in missing]
    if missing:
        return [*lines, f"GVA {address:#x} -> nothing: no memory for the table at {missing[0]:#x}"]
    if found.target is None:
        return [*lines, f"GVA {address:#x} -> nothing: {found.fault}"]
    last = found.steps[-1]
    kind = _memory_type(last, pat)
    access = X86Entry.access_name(found.access)
    flags = f"[{access} {size_name(found.size)} {kind}]"
    return [*lines, f"GVA {address:#x} -> GPA {found.target:#x} {flags}"]


def _line(step: Step, pat: tuple[str, ...]) -> str:
    entry = step.entry
    assert isinstance(entry, X86Entry)
    start = f"level {step.level} table {step.table:#x}[{step.index:#x}]: {int(entry):#x}"
    if not entry.present:
        return f"{start} -> absent"
    if faults := entry.faults(step.level):
        return f"{start} -> invalid: {', '.join(faults)}"
    access = X86Entry.access_name(entry.access)
    if entry.is_leaf(step.level):
        size, kind = size_name(page_size(step.level)), _memory_type(step, pat)
        target = f"{entry.target(step.level):#x} [{access} {size} {kind}]"
        flags = [name for name, field in _FLAGS if int(entry) & field.mask]
        if entry.protection_key:
            flags.append(f"key {entry.protection_key}")
    else:
        target = f"table {entry.address:#x} [{access}]"
        flags = ["accessed"] if entry.accessed else []
    return " ".join([start, "->", target, *flags])


def _pat(vcpu: Vcpu) -> tuple[str, ...]:
    """Return the memory types that IA32_PAT gives, by index."""
    value = vcpu.get_msrs([_IA32_PAT])[_IA32_PAT]
    return tuple(_PAT_TYPES.get(byte & 7, "?") for byte in value.to_bytes(8, "little"))


def _memory_type(step: Step, pat: tuple[str, ...]) -> str:
    """Return a leaf's memory type by the guest's own IA32_PAT (SDM vol. 3A, 12.12.3)."""
    value = int(step.entry)
    # PWT, PCD, and PAT, which is bit 7 of a 4 KiB leaf and bit 12 of a large one.
    return pat[value >> 3 & 3 | (value >> (7 if step.level == 1 else 12) & 1) << 2]
