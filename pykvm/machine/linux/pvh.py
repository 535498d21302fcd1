"""The PVH boot protocol: a 32-bit entry with paging off, and one structure that tells it all.

Source: Xen public/arch-x86/hvm/start_info.h; docs/misc/pvh.pandoc.
"""

import struct
from typing import Final

from pykvm.kvm import Vcpu
from pykvm.machine.linux.boot import BootInfo
from pykvm.machine.x86 import flat

__all__ = ["enter", "start_info"]

_MAGIC: Final = 0x336EC578
_INFO: Final = struct.Struct("<IIIIQQQQII")
_MODULE: Final = struct.Struct("<QQQQ")
_RANGE: Final = struct.Struct("<QQII")


def start_info(gpa: int, info: BootInfo) -> bytes:
    """Return the structure and the lists that it points to, which begin at `gpa`."""
    modules = [_MODULE.pack(*info.initrd, 0, 0)] if info.initrd else []
    modules_at = gpa + _INFO.size
    ranges_at = modules_at + len(modules) * _MODULE.size
    head = _INFO.pack(
        *(_MAGIC, 1, 0, len(modules), modules_at if modules else 0, info.command_line),
        *(info.rsdp, ranges_at, len(info.ranges), 0),
    )
    ranges = [_RANGE.pack(one.gpa, one.size, one.kind, 0) for one in info.ranges]
    return b"".join((head, *modules, *ranges))


def enter(vcpu: Vcpu, entry: int, info: int, gdt: int) -> None:
    """Put a vCPU into protected mode without paging, at the kernel's entry point.

    Args:
        vcpu: the vCPU.
        entry: physical address of the entry point.
        info: GPA of what `start_info` returns.
        gdt: GPA of `pykvm.machine.x86.flat.boot_gdt`.
    """
    flat.enter_protected_mode(vcpu, gdt, rip=entry, rbx=info)
