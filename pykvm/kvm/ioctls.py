"""Every KVM ioctl that pykvm uses, with the capability that it needs.

The table is names only: numbers come from ``<linux/kvm.h>`` through the C compiler when the
extension is built (`build_kvm.py` reads this table). A capability is probed on the file
descriptor that the call is made on before the call is made, so that an old kernel is reported by
the name of what it lacks and not by the errno of a call that it does not know.

Source: Documentation/virt/kvm/api.rst, chapter 4.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = ["IOCTLS", "Capability", "Ioctl", "Scope"]


class Capability(NamedTuple):
    """A capability that ``<linux/kvm.h>`` does not know: one of a kernel patch."""

    name: str
    number: int


class Scope(Enum):
    """Kinds of file descriptors that ioctls are made on."""

    SYSTEM = "system"
    VM = "vm"
    VCPU = "vcpu"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One call.

    Attributes:
        name: the macro in linux/kvm.h.
        scopes: descriptors that accept it.
        capability: the ``KVM_CAP_*`` macro that announces it, or a mapping where that depends on
            the descriptor; None where every KVM has it.
        steps: what to type or check when the call fails, by errno. A text alone stands for
            EINVAL, ENXIO, ENOENT, EEXIST and EBADF, which blame the arguments.
        number: the request of a call that linux/kvm.h does not have (one of a kernel patch).
    """

    name: str
    scopes: tuple[Scope, ...]
    capability: str | Capability | dict[Scope, str] | None = None
    steps: str | Mapping[int, str] | None = None
    number: int | None = None

    def needs(self, scope: Scope) -> str | Capability | None:
        """Return the capability that announces this call on a descriptor of `scope`, or None."""
        if isinstance(self.capability, dict):
            return self.capability.get(scope)
        return self.capability

    def next_step(self, error: int) -> str | None:
        """Return what to do after an errno of this call; None where the errno says enough."""
        if isinstance(self.steps, str):
            return self.steps if error in _OF_ARGUMENTS else None
        return self.steps.get(error) if self.steps else None


_OF_ARGUMENTS = (errno.EINVAL, errno.ENXIO, errno.ENOENT, errno.EEXIST, errno.EBADF)

_S, _V, _C, _D = Scope.SYSTEM, Scope.VM, Scope.VCPU, Scope.DEVICE

_ATTRIBUTES = {
    _S: "KVM_CAP_SYS_ATTRIBUTES",
    _V: "KVM_CAP_VM_ATTRIBUTES",
    _C: "KVM_CAP_VCPU_ATTRIBUTES",
}

_BUS_FULL = "unregister an ioeventfd or a coalesced zone first: linux has 1000 on a bus"

_TABLE = (
    # ---- system -------------------------------------------------------------------------------
    Ioctl("KVM_GET_API_VERSION", (_S,)),
    Ioctl("KVM_CREATE_VM", (_S,), None, "use a machine type of KVM_CAP_VM_TYPES, or 0"),
    Ioctl("KVM_CHECK_EXTENSION", (_S, _V)),
    Ioctl("KVM_GET_VCPU_MMAP_SIZE", (_S,)),
    Ioctl("KVM_GET_SUPPORTED_CPUID", (_S,), "KVM_CAP_EXT_CPUID"),
    Ioctl("KVM_GET_EMULATED_CPUID", (_S,), "KVM_CAP_EXT_EMUL_CPUID"),
    Ioctl("KVM_GET_MSR_INDEX_LIST", (_S,)),
    Ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", (_S,), "KVM_CAP_GET_MSR_FEATURES"),
    Ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", (_S,), "KVM_CAP_MCE"),
    # ---- VM: memory ---------------------------------------------------------------------------
    Ioctl("KVM_SET_USER_MEMORY_REGION", (_V,), "KVM_CAP_USER_MEMORY"),
    Ioctl("KVM_GET_DIRTY_LOG", (_V,), None, "set the slot with log_dirty=True first"),
    Ioctl(
        "KVM_CLEAR_DIRTY_LOG",
        (_V,),
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        "call enable_manual_dirty_log() first, and give ranges in multiples of 64 pages",
    ),
    Ioctl("KVM_SET_NR_MMU_PAGES", (_V,), "KVM_CAP_MMU_SHADOW_CACHE_CONTROL"),
    Ioctl("KVM_SET_TSS_ADDR", (_V,), "KVM_CAP_SET_TSS_ADDR"),
    Ioctl(
        "KVM_SET_IDENTITY_MAP_ADDR",
        (_V,),
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "call it before the first create_vcpu()",
    ),
    Ioctl(
        "KVM_REGISTER_COALESCED_MMIO",
        (_V,),
        "KVM_CAP_COALESCED_MMIO",
        {errno.ENOSPC: _BUS_FULL},
    ),
    Ioctl("KVM_UNREGISTER_COALESCED_MMIO", (_V,), "KVM_CAP_COALESCED_MMIO"),
    # ---- VM: interrupts and timers ------------------------------------------------------------
    Ioctl(
        "KVM_CREATE_IRQCHIP",
        (_V,),
        "KVM_CAP_IRQCHIP",
        "call it once, and before the first create_vcpu()",
    ),
    Ioctl("KVM_GET_IRQCHIP", (_V,), "KVM_CAP_IRQCHIP", "call create_irqchip() first"),
    Ioctl("KVM_SET_IRQCHIP", (_V,), "KVM_CAP_IRQCHIP", "call create_irqchip() first"),
    Ioctl("KVM_IRQ_LINE", (_V,), "KVM_CAP_IRQCHIP", "call create_irqchip() first"),
    Ioctl("KVM_IRQ_LINE_STATUS", (_V,), "KVM_CAP_IRQ_INJECT_STATUS", "call create_irqchip() first"),
    Ioctl(
        "KVM_SET_GSI_ROUTING",
        (_V,),
        "KVM_CAP_IRQ_ROUTING",
        "call create_irqchip() first, and route each gsi once to each chip, to a pin that it has",
    ),
    Ioctl("KVM_SIGNAL_MSI", (_V,), "KVM_CAP_SIGNAL_MSI", "call create_irqchip() first"),
    Ioctl("KVM_IRQFD", (_V,), "KVM_CAP_IRQFD", "call create_irqchip() first, then pass an eventfd"),
    Ioctl(
        "KVM_IOEVENTFD",
        (_V,),
        "KVM_CAP_IOEVENTFD",
        {
            errno.EINVAL: "pass an eventfd and a length of 0, 1, 2, 4 or 8",
            errno.EBADF: "pass an open eventfd",
            errno.EEXIST: "unregister_ioevent() the one that is there first",
            errno.ENOENT: "pass what register_ioevent() was given",
            errno.ENOSPC: _BUS_FULL,
        },
    ),
    Ioctl("KVM_CREATE_PIT2", (_V,), "KVM_CAP_PIT2", "call it once, after create_irqchip()"),
    Ioctl("KVM_GET_PIT2", (_V,), "KVM_CAP_PIT_STATE2", "call create_pit() first"),
    Ioctl("KVM_SET_PIT2", (_V,), "KVM_CAP_PIT_STATE2", "call create_pit() first"),
    Ioctl("KVM_REINJECT_CONTROL", (_V,), "KVM_CAP_REINJECT_CONTROL", "call create_pit() first"),
    Ioctl("KVM_GET_CLOCK", (_V,), "KVM_CAP_ADJUST_CLOCK"),
    Ioctl("KVM_SET_CLOCK", (_V,), "KVM_CAP_ADJUST_CLOCK"),
    # ---- VM: the rest -------------------------------------------------------------------------
    Ioctl(
        "KVM_CREATE_VCPU",
        (_V,),
        None,
        "use each vcpu id once, below KVM_CAP_MAX_VCPU_ID, for at most KVM_CAP_MAX_VCPUS vcpus",
    ),
    Ioctl("KVM_SET_BOOT_CPU_ID", (_V,), "KVM_CAP_SET_BOOT_CPU_ID", "call it before create_vcpu()"),
    # No capability: Linux 6.1 makes devices on x86 without announcing KVM_CAP_DEVICE_CTRL there.
    Ioctl("KVM_CREATE_DEVICE", (_V,), None, {errno.ENODEV: "ask has_device() first"}),
    Ioctl("KVM_X86_SET_MSR_FILTER", (_V,), "KVM_CAP_X86_MSR_FILTER"),
    Ioctl(
        "KVM_SET_PMU_EVENT_FILTER",
        (_V,),
        "KVM_CAP_PMU_EVENT_FILTER",
        {errno.E2BIG: "pass fewer events: linux takes 300"},
    ),
    # ---- more than one scope ------------------------------------------------------------------
    Ioctl("KVM_ENABLE_CAP", (_V, _C), {_V: "KVM_CAP_ENABLE_CAP_VM", _C: "KVM_CAP_ENABLE_CAP"}),
    Ioctl("KVM_GET_STATS_FD", (_V, _C), "KVM_CAP_BINARY_STATS_FD"),
    Ioctl("KVM_SET_TSC_KHZ", (_V, _C), {_V: "KVM_CAP_VM_TSC_CONTROL", _C: "KVM_CAP_TSC_CONTROL"}),
    Ioctl("KVM_GET_TSC_KHZ", (_V, _C), {_V: "KVM_CAP_VM_TSC_CONTROL", _C: "KVM_CAP_GET_TSC_KHZ"}),
    Ioctl("KVM_GET_MSRS", (_S, _C), {_S: "KVM_CAP_GET_MSR_FEATURES"}),
    Ioctl("KVM_HAS_DEVICE_ATTR", (_S, _V, _C, _D), _ATTRIBUTES),
    Ioctl("KVM_GET_DEVICE_ATTR", (_S, _V, _C, _D), _ATTRIBUTES),
    Ioctl("KVM_SET_DEVICE_ATTR", (_V, _C, _D), _ATTRIBUTES),
    # ---- vCPU ---------------------------------------------------------------------------------
    Ioctl("KVM_RUN", (_C,)),
    Ioctl("KVM_GET_REGS", (_C,)),
    Ioctl("KVM_SET_REGS", (_C,)),
    Ioctl("KVM_GET_SREGS", (_C,)),
    Ioctl(
        "KVM_SET_SREGS",
        (_C,),
        None,
        "make cr0, cr4, efer and the segments agree with each other, and with the CPUID that "
        "set_cpuid() gave",
    ),
    Ioctl("KVM_GET_SREGS2", (_C,), "KVM_CAP_SREGS2"),
    Ioctl("KVM_SET_SREGS2", (_C,), "KVM_CAP_SREGS2"),
    Ioctl("KVM_GET_FPU", (_C,)),
    Ioctl("KVM_SET_FPU", (_C,)),
    Ioctl("KVM_GET_XSAVE", (_C,), "KVM_CAP_XSAVE"),
    Ioctl("KVM_GET_XSAVE2", (_C,), "KVM_CAP_XSAVE2"),
    Ioctl("KVM_SET_XSAVE", (_C,), "KVM_CAP_XSAVE"),
    Ioctl("KVM_GET_XCRS", (_C,), "KVM_CAP_XCRS"),
    Ioctl("KVM_SET_XCRS", (_C,), "KVM_CAP_XCRS", "announce the features with set_cpuid() first"),
    Ioctl("KVM_GET_DEBUGREGS", (_C,), "KVM_CAP_DEBUGREGS"),
    Ioctl("KVM_SET_DEBUGREGS", (_C,), "KVM_CAP_DEBUGREGS"),
    Ioctl("KVM_GET_VCPU_EVENTS", (_C,), "KVM_CAP_VCPU_EVENTS"),
    Ioctl("KVM_SET_VCPU_EVENTS", (_C,), "KVM_CAP_VCPU_EVENTS"),
    Ioctl("KVM_GET_MP_STATE", (_C,), "KVM_CAP_MP_STATE"),
    Ioctl(
        "KVM_SET_MP_STATE", (_C,), "KVM_CAP_MP_STATE", "states other than 0 need create_irqchip()"
    ),
    Ioctl("KVM_GET_LAPIC", (_C,), "KVM_CAP_IRQCHIP", "call create_irqchip() before create_vcpu()"),
    Ioctl("KVM_SET_LAPIC", (_C,), "KVM_CAP_IRQCHIP", "call create_irqchip() before create_vcpu()"),
    Ioctl("KVM_SET_MSRS", (_C,)),
    Ioctl(
        "KVM_SET_CPUID2",
        (_C,),
        "KVM_CAP_EXT_CPUID",
        {
            errno.EINVAL: "call it before the first run(), without features that the vm lacks",
            errno.E2BIG: "leave out leaves that the guest does not need: linux keeps 256",
        },
    ),
    Ioctl("KVM_GET_CPUID2", (_C,), "KVM_CAP_EXT_CPUID"),
    Ioctl("KVM_INTERRUPT", (_C,), None, "it needs a vcpu without an in-kernel lapic"),
    Ioctl("KVM_NMI", (_C,), "KVM_CAP_USER_NMI"),
    Ioctl("KVM_SMI", (_C,), "KVM_CAP_X86_SMM"),
    Ioctl("KVM_TRANSLATE", (_C,)),
    Ioctl("KVM_SET_GUEST_DEBUG", (_C,), "KVM_CAP_SET_GUEST_DEBUG"),
    Ioctl("KVM_TPR_ACCESS_REPORTING", (_C,), "KVM_CAP_VAPIC"),
    Ioctl("KVM_KVMCLOCK_CTRL", (_C,), "KVM_CAP_KVMCLOCK_CTRL", "the guest must use kvmclock"),
    Ioctl("KVM_X86_SETUP_MCE", (_C,), "KVM_CAP_MCE"),
    Ioctl("KVM_GET_NESTED_STATE", (_C,), "KVM_CAP_NESTED_STATE"),
    Ioctl("KVM_SET_NESTED_STATE", (_C,), "KVM_CAP_NESTED_STATE"),
)

IOCTLS: dict[str, Ioctl] = {entry.name: entry for entry in _TABLE}
"""All entries by macro name."""
