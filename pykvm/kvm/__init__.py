"""Linux's KVM, on x86: handles, ioctls, exits and the run loop.

Four handles mirror KVM's descriptors, each owns one, and all are context managers: `Kvm`
(/dev/kvm), `Vm`, `Vcpu` and `Device`. `Vcpu.run` runs the guest in C, without the GIL, and returns
an `Exit`. Structs and constants are the C compiler's: see ``ffi`` and ``lib``::

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_memory_region(0, gpa=0, size=0x1000, host_address=address)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(rip=0, rflags=2)
            print(vcpu.run())

Which capability a call needs is in `pykvm.kvm.ioctls`. Errors derive from `KvmError`.

This is stock KVM. A kernel patch adds calls as `Ioctl` values for `Handle.ioctl`, capabilities as
`Capability` values, exits with `register_exit`, and handles with `Vm.adopt` (`pykvm.elisa` does).
"""

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.cpuid import CpuidEntry, find_leaf
from pykvm.kvm.device import Device
from pykvm.kvm.errors import (
    ApiVersionError,
    CapabilityMissingError,
    ConsoleError,
    HandleClosedError,
    HypercallNumberError,
    IoctlError,
    KvmError,
    KvmMissingError,
    KvmPermissionError,
    MemorySlotError,
    MemorySlotOverlapError,
    MsrError,
    NotKvmError,
    ReplyError,
    UnexpectedExitError,
    VcpuRunningError,
)
from pykvm.kvm.exits import (
    BusLock,
    Debug,
    Exit,
    FailEntry,
    GuestException,
    Hlt,
    Hypercall,
    InternalError,
    InternalErrorKind,
    Intr,
    Io,
    IoapicEoi,
    IrqWindow,
    MmioRead,
    MmioWrite,
    Nmi,
    Notify,
    Rdmsr,
    SetTpr,
    Shutdown,
    Stopped,
    SystemEvent,
    SystemEventKind,
    TprAccess,
    Unknown,
    UnknownHardware,
    Wrmsr,
    exit_name,
    register_exit,
)
from pykvm.kvm.handle import Handle, Struct
from pykvm.kvm.ioctls import IOCTLS, Capability, Ioctl, Scope
from pykvm.kvm.irq import IrqchipRoute, MsiRoute
from pykvm.kvm.msr import MsrRange
from pykvm.kvm.state import Breakpoint, MpState, Translation
from pykvm.kvm.stats import Statistic, Stats
from pykvm.kvm.system import Kvm
from pykvm.kvm.vcpu import NULL_HYPERCALL, CoalescedWrite, ExitCounts, PastExit, Vcpu
from pykvm.kvm.vm import MemorySlot, Vm

__all__ = [
    "IOCTLS",
    "NULL_HYPERCALL",
    "ApiVersionError",
    "Breakpoint",
    "BusLock",
    "Capability",
    "CapabilityMissingError",
    "CoalescedWrite",
    "ConsoleError",
    "CpuidEntry",
    "Debug",
    "Device",
    "Exit",
    "ExitCounts",
    "FailEntry",
    "GuestException",
    "Handle",
    "HandleClosedError",
    "Hlt",
    "Hypercall",
    "HypercallNumberError",
    "InternalError",
    "InternalErrorKind",
    "Intr",
    "Io",
    "IoapicEoi",
    "Ioctl",
    "IoctlError",
    "IrqWindow",
    "IrqchipRoute",
    "Kvm",
    "KvmError",
    "KvmMissingError",
    "KvmPermissionError",
    "MemorySlot",
    "MemorySlotError",
    "MemorySlotOverlapError",
    "MmioRead",
    "MmioWrite",
    "MpState",
    "MsiRoute",
    "MsrError",
    "MsrRange",
    "Nmi",
    "NotKvmError",
    "Notify",
    "PastExit",
    "Rdmsr",
    "ReplyError",
    "Scope",
    "SetTpr",
    "Shutdown",
    "Statistic",
    "Stats",
    "Stopped",
    "Struct",
    "SystemEvent",
    "SystemEventKind",
    "TprAccess",
    "Translation",
    "UnexpectedExitError",
    "Unknown",
    "UnknownHardware",
    "Vcpu",
    "VcpuRunningError",
    "Vm",
    "Wrmsr",
    "exit_name",
    "ffi",
    "find_leaf",
    "lib",
    "register_exit",
]
