"""The PVH boot protocol: a 32-bit entry with paging off, and one structure that tells it all.

Source: Xen public/arch-x86/hvm/start_info.h; docs/misc/pvh.pandoc.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pykvm.kvm import Vcpu

__all__ = ["MemoryKind", "MemoryRange", "enter", "start_info"]

_MAGIC: Final = 0x336EC578
_INFO: Final = struct.Struct("<IIIIQQQQII")
_MODULE: Final = struct.Struct("<QQQQ")
_RANGE: Final = struct.Struct("<QQII")

_CR0_PE: Final = 1 << 0
_CR0_ET: Final = 1 << 4


class MemoryKind(IntEnum):
    """Types of memory, as in E820 (ACPI specification 15)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


@dataclass(frozen=True)
class MemoryRange:
    """A range of guest physical memory.

    Attributes:
        gpa: first address.
        size: bytes.
        kind: its type.
    """

    gpa: int
    size: int
    kind: MemoryKind


def start_info(
    gpa: int,
    ranges: Sequence[MemoryRange],
    *,
    command_line: int,
    rsdp: int,
    initrd: tuple[int, int] | None = None,
) -> bytes:
    """Return the structure and the lists that it points to.

    Args:
        gpa: where it will be.
        ranges: the guest's memory.
        command_line: GPA of the command line, which ends in a zero.
        rsdp: GPA of ACPI's root pointer.
        initrd: GPA and size of the initial RAM disk.
    """
    modules = [_MODULE.pack(initrd[0], initrd[1], 0, 0)] if initrd else []
    modules_at = gpa + _INFO.size
    ranges_at = modules_at + len(modules) * _MODULE.size
    info = _INFO.pack(
        *(_MAGIC, 1, 0, len(modules), modules_at if modules else 0, command_line, rsdp),
        *(ranges_at, len(ranges), 0),
    )
    listed = [_RANGE.pack(one.gpa, one.size, one.kind, 0) for one in ranges]
    return b"".join((info, *modules, *listed))


def enter(vcpu: Vcpu, entry: int, info: int) -> None:
    """Put a vCPU into protected mode without paging, at the kernel's entry point.

    Args:
        vcpu: the vCPU.
        entry: physical address of the entry point.
        info: GPA of what `start_info` returns.
    """
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.selector = (
            0,
            0xFFFFFFFF,
            0x10 if name == "cs" else 0x18,
        )
        segment.type = 0xB if name == "cs" else 0x3
        segment.present = segment.s = segment.g = segment.db = 1
        segment.dpl = segment.avl = segment.unusable = segment.l = 0
    task = sregs.tr
    task.base, task.limit, task.selector = 0, 0x67, 0x20
    task.type, task.present, task.s, task.g, task.unusable = 0xB, 1, 0, 0, 0
    sregs.gdt.base = sregs.gdt.limit = sregs.idt.base = sregs.idt.limit = 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0_PE | _CR0_ET, 0, 0, 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(rip=entry, rbx=info, rflags=2)
