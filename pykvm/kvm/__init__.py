"""Linux's KVM: handles, ioctls, exits and the run loop. The architecture's part is `x86`.

Four handles mirror KVM's descriptors, each owns one, and all are context managers: `Kvm`
(/dev/kvm), `Vm`, `Vcpu` and `Device`. `Vcpu.run` runs the guest in C, without the GIL, and returns
an `Exit` that no handler of ``vm.handlers`` has served. Methods have the names of KVM's calls, as
rust-vmm's kvm-ioctls has them. Structs and constants are the C compiler's: see ``ffi`` and
``lib``::

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(0, gpa=0, size=0x1000, host_address=address)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(rip=0, rflags=2)
            print(vcpu.run())

Which capability a call needs is in `pykvm.kvm.ioctls`. Errors derive from `KvmError`.

This is stock KVM. A kernel patch adds calls as `Ioctl` values for `Handle.ioctl`, capabilities as
`Capability` values, exits with `register_exit`, and handles with `Handle.adopt` (`pykvm.elisa`
does).
"""

from pykvm.closeable import ForkedProcessError
from pykvm.kvm.device import Device
from pykvm.kvm.errors import (
    ApiVersionError,
    BreakpointError,
    CapabilityMissingError,
    DirtyLogError,
    GsiRoutingError,
    HandleClosedError,
    HandlerError,
    HandlerOverlapError,
    IoctlError,
    KvmError,
    KvmMissingError,
    KvmPermissionError,
    MemorySlotError,
    MemorySlotOverlapError,
    MsrError,
    MsrFilterError,
    NotKvmError,
    ReplyError,
    StateSizeError,
    UnexpectedExitError,
    VcpuRunningError,
)
from pykvm.kvm.exits import (
    Debug,
    Exit,
    Hlt,
    Hypercall,
    Io,
    MmioRead,
    MmioWrite,
    Shutdown,
    Stopped,
    SystemEvent,
    SystemEventKind,
)
from pykvm.kvm.handle import Handle
from pykvm.kvm.handlers import NULL_HYPERCALL, Handler, Handlers
from pykvm.kvm.interrupts import IrqchipRoute, MsiRoute
from pykvm.kvm.ioctls import IOCTLS, Capability, Ioctl, Scope
from pykvm.kvm.memory_slots import MemorySlot
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.kvm.native.decoders import (
    FailEntry,
    InternalError,
    InternalErrorKind,
    Intr,
    Unknown,
    Unsupported,
    exit_name,
    register_exit,
)
from pykvm.kvm.stats import Statistic, Stats
from pykvm.kvm.system import Kvm
from pykvm.kvm.vcpu import CoalescedWrite, ExitCounts, PastExit, Vcpu
from pykvm.kvm.vm import Vm
from pykvm.kvm.x86.cpuid import CpuidEntry, find_leaf
from pykvm.kvm.x86.exits import (
    BusLock,
    GuestException,
    IoapicEoi,
    IrqWindow,
    Nmi,
    Notify,
    Rdmsr,
    SetTpr,
    TprAccess,
    Wrmsr,
)
from pykvm.kvm.x86.msr import MsrRange
from pykvm.kvm.x86.vcpu import Breakpoint, MpState, Translation

__all__ = [
    "IOCTLS",
    "NULL_HYPERCALL",
    "ApiVersionError",
    "Breakpoint",
    "BreakpointError",
    "BusLock",
    "Capability",
    "CapabilityMissingError",
    "CoalescedWrite",
    "CpuidEntry",
    "Debug",
    "Device",
    "DirtyLogError",
    "Exit",
    "ExitCounts",
    "FailEntry",
    "ForkedProcessError",
    "GsiRoutingError",
    "GuestException",
    "Handle",
    "HandleClosedError",
    "Handler",
    "HandlerError",
    "HandlerOverlapError",
    "Handlers",
    "Hlt",
    "Hypercall",
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
    "MsrFilterError",
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
    "StateSizeError",
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
    "Unsupported",
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
