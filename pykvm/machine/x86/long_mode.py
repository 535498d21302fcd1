"""The processor of a 64-bit guest: its features, its descriptors and its initial state.

Source: SDM vol. 3A, 2.5 (control registers), 3.4.5 (descriptors), 10.8.5 (entering long mode).
"""

import struct
from collections.abc import Sequence
from typing import Final

from pykvm.errors import PykvmError
from pykvm.kvm import CpuidEntry, Kvm, Vcpu, find_leaf
from pykvm.machine.x86.control_registers import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)

__all__ = [
    "CODE_SELECTOR",
    "DATA_SELECTOR",
    "PagingLevelsError",
    "descriptors",
    "enter",
    "set_apic_id",
    "set_hypervisor",
    "supported_features",
]


# CPUID bits: leaf 1, ECX; leaf 7, EBX, EBX and ECX.
_TSC_DEADLINE: Final = 1 << 24
_HYPERVISOR: Final = 1 << 31
_SMEP: Final = 1 << 7
_SMAP: Final = 1 << 20
_LA57: Final = 1 << 16

# Flat 64-bit code and data segments for ring 0, and an available TSS.
_CODE: Final = 0x00AF_9B00_0000_FFFF
_DATA: Final = 0x00CF_9300_0000_FFFF
CODE_SELECTOR: Final = 0x08
DATA_SELECTOR: Final = 0x10
_TSS_SELECTOR: Final = 0x18
_TSS_LIMIT: Final = 0x67


class PagingLevelsError(PykvmError):
    """Five-level paging, on a processor or a KVM without it."""


def supported_features(kvm: Kvm, *, contexts: bool, irqchip: bool) -> list[CpuidEntry]:
    """Return the CPUID leaves of a guest: those that KVM supports, without unsuitable features.

    Args:
        kvm: an open ``/dev/kvm``.
        contexts: whether the VM has contexts enabled. Features that have not been checked together
            with contexts are then left out (`without_hidden_features`).
        irqchip: whether KVM emulates the local APIC. Its timer then has the TSC-deadline mode.
    """
    entries = kvm.get_supported_cpuid()
    if contexts:
        # Most Linux guests have no contexts, and start faster without all that makes them.
        from pykvm.elisa.hidden_features import without_hidden_features  # noqa: PLC0415

        entries = without_hidden_features(entries)
    leaf = find_leaf(entries, 1)
    # KVM_GET_SUPPORTED_CPUID omits this bit, because it depends on the local APIC's emulation
    # (api.rst 4.46).
    if irqchip and leaf and kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"):
        leaf.ecx |= _TSC_DEADLINE
    return entries


def set_apic_id(entries: Sequence[CpuidEntry], apic_id: int) -> None:
    """Put the APIC id of a vCPU into its CPUID leaves (SDM vol. 2A, CPUID leaves 1, 0BH and 1FH).

    KVM_GET_SUPPORTED_CPUID leaves that of the host's processor there on which it was called, and
    KVM_SET_CPUID2 refuses other leaves once the vCPU has run.
    """
    for entry in entries:
        if entry.function == 1:
            entry.ebx = (entry.ebx & 0x00FF_FFFF) | (apic_id & 0xFF) << 24
        elif entry.function in (0xB, 0x1F):
            entry.edx = apic_id


def set_hypervisor(entries: Sequence[CpuidEntry]) -> None:
    """Tell a guest that it runs on a hypervisor, so that it looks for KVM's own leaves.

    KVM_GET_SUPPORTED_CPUID leaves that to user space (Linux Documentation/virt/kvm/x86/cpuid.rst).
    """
    if leaf := find_leaf(entries, 1):
        leaf.ecx |= _HYPERVISOR


def descriptors(tss: int) -> bytes:
    """Return a global descriptor table: null, code, data, and the TSS at the address `tss`."""
    low = _TSS_LIMIT | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56
    return struct.pack("<5Q", 0, _CODE, _DATA, low, tss >> 32)


def enter(
    vcpu: Vcpu,
    page_tables: int,
    cpuid: Sequence[CpuidEntry],
    *,
    gdt: int,
    idt: int,
    tss: int,
    levels: int = 4,
) -> None:
    """Put a vCPU into 64-bit mode with paging.

    SMEP and SMAP are switched on if the vCPU has them; attachments for kernel mode need them.

    Args:
        vcpu: the vCPU.
        page_tables: GPA of the root of the page tables.
        cpuid: the vCPU's CPUID leaves.
        gdt: GVA of what `descriptors` returns.
        idt: GVA of the interrupt descriptor table, which is empty until the guest sets its own.
        tss: GVA of the task state segment.
        levels: levels of the page tables, 4 or 5.

    Raises:
        PagingLevelsError: `levels` is 5, and the vCPU has no LA57.
    """
    leaf = find_leaf(cpuid, 7)
    features = leaf.ebx if leaf else 0
    if levels == 5 and not (leaf and leaf.ecx & _LA57):
        raise PagingLevelsError(
            "this kvm offers no five-level paging",
            "use four levels, or pykvm testbed --cpu sapphire_rapids",
        )
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        code = name == "cs"
        segment.base = 0
        segment.limit = 0xFFFFFFFF
        segment.selector = CODE_SELECTOR if code else DATA_SELECTOR
        segment.type = 0xB if code else 0x3
        segment.present = segment.s = segment.g = 1
        segment.dpl = segment.avl = segment.unusable = 0
        segment.l = int(code)
        segment.db = int(not code)
    task = sregs.tr
    task.base, task.limit, task.selector = tss, _TSS_LIMIT, _TSS_SELECTOR
    task.type, task.present, task.s, task.g, task.unusable = 0xB, 1, 0, 0, 0
    sregs.gdt.base, sregs.gdt.limit = gdt, len(descriptors(tss)) - 1
    sregs.idt.base, sregs.idt.limit = idt, 0
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG
    sregs.cr3 = page_tables
    sregs.cr4 = CR4_PAE | (CR4_LA57 if levels == 5 else 0)
    sregs.cr4 |= CR4_SMEP if features & _SMEP else 0
    sregs.cr4 |= CR4_SMAP if features & _SMAP else 0
    sregs.efer = EFER_LME | EFER_LMA | EFER_NXE
    vcpu.set_sregs(sregs)
