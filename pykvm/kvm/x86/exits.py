"""Exits of KVM on x86 alone, and their decoders; importing this module registers them.

Source: Documentation/virt/kvm/api.rst chapter 5 ("The kvm_run structure").
"""

from __future__ import annotations

from dataclasses import dataclass

from pykvm.kvm.exits import Exit
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.kvm.native.decoders import Decoder, exit_name, register_exit

__all__ = [
    "BusLock",
    "GuestException",
    "IoapicEoi",
    "IrqWindow",
    "Nmi",
    "Notify",
    "Rdmsr",
    "SetTpr",
    "TprAccess",
    "Wrmsr",
]


@dataclass(frozen=True, slots=True)
class GuestException(Exit):
    """KVM_EXIT_EXCEPTION."""

    vector: int
    error_code: int

    def __str__(self) -> str:
        return f"exception {self.vector}, error code {self.error_code:#x}"


@dataclass(frozen=True, slots=True)
class IrqWindow(Exit):
    """The guest takes interrupts now, as `Vcpu.request_irq_window` asked."""

    def __str__(self) -> str:
        return "interrupt window open"


@dataclass(frozen=True, slots=True)
class SetTpr(Exit):
    """The guest lowered its task priority (CR8) under what user space had seen."""

    def __str__(self) -> str:
        return "task priority set"


@dataclass(frozen=True, slots=True)
class TprAccess(Exit):
    """An access to the task-priority register (KVM_TPR_ACCESS_REPORTING)."""

    rip: int
    is_write: bool

    def __str__(self) -> str:
        return f"tpr {'write' if self.is_write else 'read'} at {self.rip:#x}"


@dataclass(frozen=True, slots=True)
class Nmi(Exit):
    """KVM_EXIT_NMI."""

    def __str__(self) -> str:
        return "nmi"


@dataclass(frozen=True, slots=True)
class IoapicEoi(Exit):
    """End of a level-triggered interrupt, for the IOAPIC in user space (split irqchip)."""

    vector: int

    def __str__(self) -> str:
        return f"end of interrupt, vector {self.vector:#x}"


@dataclass(frozen=True, slots=True)
class Rdmsr(Exit):
    """RDMSR that KVM leaves to user space; needs `Vcpu.reply` or `Vcpu.reply_fault`.

    Attributes:
        index: the MSR's number.
        why: ``KVM_MSR_EXIT_REASON_*``.
    """

    index: int
    why: int

    def __str__(self) -> str:
        return f"rdmsr {self.index:#x}"


@dataclass(frozen=True, slots=True)
class Wrmsr(Exit):
    """WRMSR that KVM leaves to user space; `Vcpu.reply_fault()` makes it a #GP."""

    index: int
    value: int
    why: int

    def __str__(self) -> str:
        return f"wrmsr {self.index:#x} = {self.value:#x}"


@dataclass(frozen=True, slots=True)
class BusLock(Exit):
    """The guest held a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    def __str__(self) -> str:
        return "bus lock"


@dataclass(frozen=True, slots=True)
class Notify(Exit):
    """No event window for too long (KVM_CAP_X86_NOTIFY_VMEXIT)."""

    flags: int

    def __str__(self) -> str:
        return f"notify, flags {self.flags:#x}"


def _exception(_run: Struct, union: Struct) -> Exit:
    ex = ffi.cast("kvm_exit_ex *", union)
    return GuestException(ex.exception, ex.error_code)


def _tpr_access(_run: Struct, union: Struct) -> Exit:
    access = ffi.cast("kvm_exit_tpr_access *", union)
    return TprAccess(access.rip, bool(access.is_write))


def _rdmsr(_run: Struct, union: Struct) -> Exit:
    msr = ffi.cast("kvm_exit_msr *", union)
    return Rdmsr(msr.index, msr.reason)


def _wrmsr(_run: Struct, union: Struct) -> Exit:
    msr = ffi.cast("kvm_exit_msr *", union)
    return Wrmsr(msr.index, msr.data, msr.reason)


_DECODERS: dict[int, Decoder] = {
    lib.KVM_EXIT_EXCEPTION: _exception,
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: lambda _run, _union: IrqWindow(),
    lib.KVM_EXIT_SET_TPR: lambda _run, _union: SetTpr(),
    lib.KVM_EXIT_TPR_ACCESS: _tpr_access,
    lib.KVM_EXIT_NMI: lambda _run, _union: Nmi(),
    lib.KVM_EXIT_IOAPIC_EOI: lambda _run, union: IoapicEoi(
        ffi.cast("kvm_exit_eoi *", union).vector
    ),
    lib.KVM_EXIT_X86_RDMSR: _rdmsr,
    lib.KVM_EXIT_X86_WRMSR: _wrmsr,
    lib.KVM_EXIT_X86_BUS_LOCK: lambda _run, _union: BusLock(),
    lib.KVM_EXIT_NOTIFY: lambda _run, union: Notify(ffi.cast("kvm_exit_notify *", union).flags),
}

for _reason, _decoder in _DECODERS.items():
    register_exit(_reason, exit_name(_reason), _decoder)
