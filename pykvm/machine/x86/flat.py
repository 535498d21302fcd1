"""Flat segments, with which kernels are entered by their boot protocols.

Source: SDM vol. 3A, 3.4.5; Linux Documentation/arch/x86/boot.rst (__BOOT_CS, __BOOT_DS).
"""

import struct
from typing import Final

from pykvm.kvm import Struct, Vcpu
from pykvm.machine.x86.control_registers import CR0_ET, CR0_PE

__all__ = [
    "BOOT_CODE",
    "BOOT_DATA",
    "BOOT_GDT_SIZE",
    "boot_gdt",
    "enter_protected_mode",
    "set_flat_segments",
]

BOOT_CODE: Final = 0x10
BOOT_DATA: Final = 0x18
_BOOT_TASK: Final = 0x20
BOOT_GDT_SIZE: Final = 0x28

_CODE_64: Final = 0x00AF_9B00_0000_FFFF
_CODE_32: Final = 0x00CF_9B00_0000_FFFF
_DATA: Final = 0x00CF_9300_0000_FFFF
_TASK: Final = 0x0000_8B00_0000_0067


def boot_gdt(*, long: bool) -> bytes:
    """Return a table with the descriptors that `set_flat_segments` names.

    Args:
        long: whether code is 64-bit code, instead of 32-bit code.
    """
    return struct.pack("<5Q", 0, 0, _CODE_64 if long else _CODE_32, _DATA, _TASK)


def set_flat_segments(sregs: Struct, gdt: int, *, long: bool) -> None:
    """Put flat segments at privilege level 0 into a struct kvm_sregs.

    Args:
        sregs: the state to change.
        gdt: linear address of `boot_gdt`.
        long: whether code is 64-bit code, instead of 32-bit code.
    """
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        code = name == "cs"
        segment.base, segment.limit = 0, 0xFFFFFFFF
        segment.selector = BOOT_CODE if code else BOOT_DATA
        segment.type = 0xB if code else 0x3
        segment.present = segment.s = segment.g = 1
        segment.dpl = segment.avl = segment.unusable = 0
        segment.l = int(code and long)
        segment.db = int(not (code and long))
    task = sregs.tr
    task.base, task.limit, task.selector = 0, 0x67, _BOOT_TASK
    task.type, task.present, task.s, task.g, task.unusable = 0xB, 1, 0, 0, 0
    sregs.gdt.base, sregs.gdt.limit = gdt, BOOT_GDT_SIZE - 1
    sregs.idt.base = sregs.idt.limit = 0


def enter_protected_mode(vcpu: Vcpu, gdt: int, **registers: int) -> None:
    """Put a vCPU into 32-bit protected mode without paging, with interrupts off.

    Args:
        vcpu: the vCPU.
        gdt: physical address of `boot_gdt`.
        registers: general registers, as `Vcpu.set_regs` takes them.
    """
    sregs = vcpu.get_sregs()
    set_flat_segments(sregs, gdt, long=False)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_PE | CR0_ET, 0, 0, 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(**registers, rflags=2)
