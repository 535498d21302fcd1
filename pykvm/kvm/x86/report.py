"""A report on a vCPU that stopped unexpectedly, or does not go on, for a person to read.

Registers, what the processor was doing (mode, context), the bytes of the instruction, and the
last exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pykvm.kvm.errors import KvmError
from pykvm.kvm.native import Struct
from pykvm.kvm.x86.vcpu import X86Vcpu

__all__ = ["describe", "linear_address"]

ReadPhysical = Callable[[int, int], bytes]
"""Returns bytes of guest memory at a GPA, as many as asked for or fewer."""

Translate = Callable[[int], int | None]
"""Returns the GPA of a linear address, or None."""

_ROWS = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rsp", "rbp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

# SDM vol. 3A 2.5: control-register bits that decide the mode; vol. 3A 2.2.1: EFER.
_CR0_PE, _CR0_PG, _EFER_LMA = 1 << 0, 1 << 31, 1 << 10


def describe(
    vcpu: X86Vcpu,
    vcpu_id: int,
    found: object,
    past: Iterable[object],
    read_physical: ReadPhysical,
    translate: Translate | None = None,
) -> str:
    """Return the report, several lines. A part that cannot be read says so instead of raising.

    Args:
        vcpu: the vCPU, which does not run.
        vcpu_id: its id.
        found: the exit, or other news of the vCPU, for the first line.
        past: the last exits, oldest first.
        read_physical: reads guest memory.
        translate: finds the instruction; by default KVM_TRANSLATE, which finds no user's page of a
            guest with SMAP.
    """
    lines = [f"vcpu {vcpu_id}: {found}"]
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        lines += _registers(regs, sregs)
        linear = linear_address(regs, sregs)
        where = (translate or _translation(vcpu))(linear)
        lines.append(_instruction(linear, where, read_physical))
    except KvmError as error:
        lines.append(f"no registers: {error}")
    lines.append("last exits, oldest first:")
    lines += [f"  {each}" for each in past] or ["  none"]
    return "\n".join(lines)


def _registers(regs: Struct, sregs: Struct) -> list[str]:
    lines = [f"{_mode(sregs)}, rip {regs.rip:#x}, rflags {regs.rflags:#x}"]
    for row in _ROWS:
        lines.append("  ".join(f"{name:>3} {getattr(regs, name):016x}" for name in row))
    lines.append(
        f"cr0 {sregs.cr0:x}  cr2 {sregs.cr2:x}  cr3 {sregs.cr3:x}  cr4 {sregs.cr4:x}  "
        f"cr8 {sregs.cr8:x}  efer {sregs.efer:x}"
    )
    for name in _SEGMENTS:
        each = getattr(sregs, name)
        if each.unusable:
            lines.append(f"{name:>3} {each.selector:04x} unusable")
        else:
            lines.append(
                f"{name:>3} {each.selector:04x} base {each.base:x} limit {each.limit:x} "
                f"type {each.type:x} dpl {each.dpl} l {each.l} db {each.db}"
            )
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        lines.append(f"{name} base {table.base:x} limit {table.limit:x}")
    return lines


def _mode(sregs: Struct) -> str:
    if not sregs.cr0 & _CR0_PE:
        return "real mode"
    if sregs.efer & _EFER_LMA:
        mode = "64-bit mode" if sregs.cs.l else "compatibility mode"
    else:
        mode = "protected mode"
    paging = "" if sregs.cr0 & _CR0_PG else ", no paging"
    return f"{mode}{paging}, cpl {sregs.ss.dpl}"


def linear_address(regs: Struct, sregs: Struct) -> int:
    """Return the linear address of the next instruction."""
    if sregs.efer & _EFER_LMA:
        return int(regs.rip)
    return int(sregs.cs.base + regs.rip) & 0xFFFFFFFF


def _translation(vcpu: X86Vcpu) -> Translate:
    def translate(address: int) -> int | None:
        found = vcpu.translate_gva(address)
        return None if found is None else found.physical

    return translate


def _instruction(linear: int, where: int | None, read_physical: ReadPhysical) -> str:
    """The bytes at RIP, read through the guest's page tables and the default EPT."""
    if where is None:
        return f"instruction at {linear:#x}: not mapped by the guest"
    code = read_physical(where, 15)
    if not code:
        return f"instruction at {linear:#x} (GPA {where:#x}): no memory there"
    return f"instruction at {linear:#x} (GPA {where:#x}): {code.hex(' ')}"
