"""Why KVM_RUN came back: one small class per exit reason, decoded from struct kvm_run.

Exits that this module has no class for arrive as `Unknown`, with their number: nothing is
swallowed, and a kernel may be newer than pykvm.

Source: Documentation/virt/kvm/api.rst chapter 5 ("The kvm_run structure").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.handle import Struct

__all__ = [
    "BusLock",
    "Debug",
    "Exit",
    "FailEntry",
    "GuestException",
    "Hlt",
    "Hypercall",
    "InternalError",
    "InternalErrorKind",
    "Intr",
    "Io",
    "IoapicEoi",
    "IrqWindow",
    "MmioRead",
    "MmioWrite",
    "Nmi",
    "Notify",
    "Rdmsr",
    "SetTpr",
    "Shutdown",
    "Stopped",
    "SystemEvent",
    "SystemEventKind",
    "TprAccess",
    "Unknown",
    "UnknownHardware",
    "Wrmsr",
    "decode_exit",
    "exit_name",
    "register_exit",
]


class Exit:
    """Base of all exits; `str()` of one is a line for a reader."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Stopped(Exit):
    """`Vcpu.stop` was called. The guest goes on where it was at the next run()."""

    def __str__(self) -> str:
        return "stopped"


@dataclass(frozen=True, slots=True)
class UnknownHardware(Exit):
    """KVM_EXIT_UNKNOWN: the processor's exit reason, which KVM does not handle."""

    hardware_reason: int

    def __str__(self) -> str:
        return f"unknown exit of the processor, reason {self.hardware_reason:#x}"


@dataclass(frozen=True, slots=True)
class GuestException(Exit):
    """KVM_EXIT_EXCEPTION."""

    vector: int
    error_code: int

    def __str__(self) -> str:
        return f"exception {self.vector}, error code {self.error_code:#x}"


@dataclass(frozen=True, slots=True)
class Io(Exit):
    """Port input or output, `count` accesses of `size` bytes at one port.

    data: what the guest wrote, size * count bytes; empty for input, which wants
    `Vcpu.reply(bytes)` before the next run().
    """

    port: int
    size: int
    count: int
    is_write: bool
    data: bytes

    @property
    def value(self) -> int:
        """The first access as a number."""
        return int.from_bytes(self.data[: self.size], "little")

    def __str__(self) -> str:
        many = f" x{self.count}" if self.count != 1 else ""
        if self.is_write:
            return f"out port {self.port:#x}, {self.size} bytes{many}: {self.data[:16].hex()}"
        return f"in port {self.port:#x}, {self.size} bytes{many}"


@dataclass(frozen=True, slots=True)
class MmioRead(Exit):
    """A read of guest physical memory that no slot holds; wants `Vcpu.reply`."""

    address: int
    size: int

    def __str__(self) -> str:
        return f"read of {self.size} bytes at GPA {self.address:#x}, where no memory is"


@dataclass(frozen=True, slots=True)
class MmioWrite(Exit):
    """A write to guest physical memory that no slot holds, or to a read-only slot."""

    address: int
    data: bytes

    @property
    def value(self) -> int:
        return int.from_bytes(self.data, "little")

    def __str__(self) -> str:
        return (
            f"write of {len(self.data)} bytes at GPA {self.address:#x}, where no memory is: "
            f"{self.data.hex()}"
        )


@dataclass(frozen=True, slots=True)
class Hypercall(Exit):
    """A hypercall for user space that has no native handler; wants `Vcpu.reply(result)`."""

    number: int
    args: tuple[int, ...]
    long_mode: bool

    def __str__(self) -> str:
        return f"hypercall {self.number:#x}({', '.join(f'{arg:#x}' for arg in self.args)})"


@dataclass(frozen=True, slots=True)
class Debug(Exit):
    """Single step, breakpoint or watchpoint (see `Vcpu.guest_debug`).

    exception: 1 for #DB, 3 for #BP. dr6 says which: bits 0-3 breakpoints, bit 14 single step.
    """

    exception: int
    pc: int
    dr6: int
    dr7: int

    @property
    def single_step(self) -> bool:
        return bool(self.dr6 >> 14 & 1)

    def __str__(self) -> str:
        return f"debug exception {self.exception} at {self.pc:#x}, dr6 {self.dr6:#x}"


@dataclass(frozen=True, slots=True)
class Hlt(Exit):
    """HLT, where no in-kernel local APIC waits for the interrupt."""

    def __str__(self) -> str:
        return "hlt"


@dataclass(frozen=True, slots=True)
class IrqWindow(Exit):
    """The guest takes interrupts now, as `Vcpu.request_irq_window` asked."""

    def __str__(self) -> str:
        return "interrupt window open"


@dataclass(frozen=True, slots=True)
class Shutdown(Exit):
    """A triple fault, or what else resets the processor."""

    def __str__(self) -> str:
        return "shutdown (triple fault)"


@dataclass(frozen=True, slots=True)
class FailEntry(Exit):
    """The processor refused the guest's state (SDM vol. 3C 27.8, "VM-entry failures")."""

    hardware_reason: int
    cpu: int

    def __str__(self) -> str:
        return f"vm entry failed, reason {self.hardware_reason:#x} on cpu {self.cpu}"


@dataclass(frozen=True, slots=True)
class Intr(Exit):
    """KVM_EXIT_INTR."""

    def __str__(self) -> str:
        return "interrupted"


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


class InternalErrorKind(IntEnum):
    """KVM_INTERNAL_ERROR_*."""

    EMULATION = lib.KVM_INTERNAL_ERROR_EMULATION
    SIMUL_EX = lib.KVM_INTERNAL_ERROR_SIMUL_EX
    DELIVERY_EV = lib.KVM_INTERNAL_ERROR_DELIVERY_EV
    UNEXPECTED_EXIT_REASON = lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON


@dataclass(frozen=True, slots=True)
class InternalError(Exit):
    """KVM could not go on. data: words whose meaning depends on suberror.

    For an instruction that KVM failed to emulate, data[0] holds flags and the instruction bytes
    follow where bit 0 of them is set (struct kvm_run.emulation_failure).
    """

    suberror: int
    data: tuple[int, ...]

    @property
    def instruction(self) -> bytes:
        """The instruction that was not emulated, where KVM says; else empty."""
        flag = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if (
            self.suberror != InternalErrorKind.EMULATION
            or len(self.data) < 3
            or not self.data[0] & flag
        ):
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return raw[1 : 1 + min(raw[0], 15)]

    def __str__(self) -> str:
        try:
            kind = InternalErrorKind(self.suberror).name.lower().replace("_", " ")
        except ValueError:
            kind = f"suberror {self.suberror}"
        tail = f" of {self.instruction.hex(' ')}" if self.instruction else ""
        return f"internal error of kvm: {kind}{tail}"


class SystemEventKind(IntEnum):
    """KVM_SYSTEM_EVENT_*."""

    SHUTDOWN = lib.KVM_SYSTEM_EVENT_SHUTDOWN
    RESET = lib.KVM_SYSTEM_EVENT_RESET
    CRASH = lib.KVM_SYSTEM_EVENT_CRASH
    WAKEUP = lib.KVM_SYSTEM_EVENT_WAKEUP
    SUSPEND = lib.KVM_SYSTEM_EVENT_SUSPEND
    SEV_TERM = lib.KVM_SYSTEM_EVENT_SEV_TERM


@dataclass(frozen=True, slots=True)
class SystemEvent(Exit):
    """The whole VM asks for something; kind: a `SystemEventKind`, or a newer number."""

    kind: int
    data: tuple[int, ...]

    def __str__(self) -> str:
        try:
            return f"system event: {SystemEventKind(self.kind).name.lower()}"
        except ValueError:
            return f"system event {self.kind}"


@dataclass(frozen=True, slots=True)
class IoapicEoi(Exit):
    """End of a level-triggered interrupt, for the IOAPIC in user space (split irqchip)."""

    vector: int

    def __str__(self) -> str:
        return f"end of interrupt, vector {self.vector:#x}"


@dataclass(frozen=True, slots=True)
class Rdmsr(Exit):
    """RDMSR that KVM leaves to user space; wants `Vcpu.reply(value)` or `reply_fault()`.

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


@dataclass(frozen=True, slots=True)
class Unknown(Exit):
    """An exit that pykvm does not decode. payload: the first 64 bytes of kvm_run's union."""

    number: int
    payload: bytes

    def __str__(self) -> str:
        return f"{exit_name(self.number)}, payload {self.payload[:32].hex()}"


def _exit_names() -> dict[int, str]:
    parts_of_others = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_")
    return {
        getattr(lib, name): name
        for name in dir(lib)
        if name.startswith("KVM_EXIT_") and not name.startswith(parts_of_others)
    }


_EXIT_NAMES = _exit_names()


def exit_name(reason: int) -> str:
    """The macro's name, or "exit reason N" where linux/kvm.h has none."""
    return _EXIT_NAMES.get(reason, f"exit reason {reason}")


# ---- decoding -----------------------------------------------------------------------------------


def _io(run: Struct, union: Struct) -> Exit:
    io = ffi.cast("kvm_exit_io *", union)
    is_write = io.direction == lib.KVM_EXIT_IO_OUT
    data = b""
    if is_write:
        start = ffi.cast("char *", run) + io.data_offset
        data = ffi.buffer(start, io.size * io.count)[:]
    return Io(io.port, io.size, io.count, is_write, data)


def _mmio(_run: Struct, union: Struct) -> Exit:
    mmio = ffi.cast("kvm_exit_mmio *", union)
    if mmio.is_write:
        return MmioWrite(mmio.phys_addr, bytes(mmio.data[0 : mmio.len]))
    return MmioRead(mmio.phys_addr, mmio.len)


def _hypercall(_run: Struct, union: Struct) -> Exit:
    call = ffi.cast("kvm_exit_hypercall *", union)
    return Hypercall(call.nr, tuple(call.args), bool(call.longmode))


def _debug(_run: Struct, union: Struct) -> Exit:
    arch = ffi.cast("kvm_exit_debug *", union).arch
    return Debug(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _fail_entry(_run: Struct, union: Struct) -> Exit:
    entry = ffi.cast("kvm_exit_fail_entry *", union)
    return FailEntry(entry.hardware_entry_failure_reason, entry.cpu)


def _internal(_run: Struct, union: Struct) -> Exit:
    error = ffi.cast("kvm_exit_internal *", union)
    return InternalError(error.suberror, tuple(error.data[0 : min(error.ndata, 16)]))


def _system_event(run: Struct, union: Struct) -> Exit:
    event = ffi.cast("kvm_exit_system_event *", union)
    data = lib.pykvm_system_event_data(run)
    return SystemEvent(event.type, tuple(data[0 : min(event.ndata, 16)]))


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


Decoder = Callable[[Struct, Struct], Exit]
"""Takes the struct kvm_run, and a pointer to its union."""

_DECODERS: dict[int, Decoder] = {
    lib.KVM_EXIT_UNKNOWN: lambda _run, union: UnknownHardware(
        ffi.cast("kvm_exit_hw *", union).hardware_exit_reason
    ),
    lib.KVM_EXIT_EXCEPTION: _exception,
    lib.KVM_EXIT_IO: _io,
    lib.KVM_EXIT_HYPERCALL: _hypercall,
    lib.KVM_EXIT_DEBUG: _debug,
    lib.KVM_EXIT_HLT: lambda _run, _union: Hlt(),
    lib.KVM_EXIT_MMIO: _mmio,
    lib.KVM_EXIT_IRQ_WINDOW_OPEN: lambda _run, _union: IrqWindow(),
    lib.KVM_EXIT_SHUTDOWN: lambda _run, _union: Shutdown(),
    lib.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    lib.KVM_EXIT_INTR: lambda _run, _union: Intr(),
    lib.KVM_EXIT_SET_TPR: lambda _run, _union: SetTpr(),
    lib.KVM_EXIT_TPR_ACCESS: _tpr_access,
    lib.KVM_EXIT_NMI: lambda _run, _union: Nmi(),
    lib.KVM_EXIT_INTERNAL_ERROR: _internal,
    lib.KVM_EXIT_SYSTEM_EVENT: _system_event,
    lib.KVM_EXIT_IOAPIC_EOI: lambda _run, union: IoapicEoi(
        ffi.cast("kvm_exit_eoi *", union).vector
    ),
    lib.KVM_EXIT_X86_RDMSR: _rdmsr,
    lib.KVM_EXIT_X86_WRMSR: _wrmsr,
    lib.KVM_EXIT_X86_BUS_LOCK: lambda _run, _union: BusLock(),
    lib.KVM_EXIT_NOTIFY: lambda _run, union: Notify(ffi.cast("kvm_exit_notify *", union).flags),
}


def register_exit(reason: int, name: str, decoder: Decoder) -> None:
    """Name and decode an exit reason that ``<linux/kvm.h>`` does not know: one of a patch."""
    _EXIT_NAMES[reason] = name
    _DECODERS[reason] = decoder


def decode_exit(run: Struct) -> Exit:
    """The exit that a struct kvm_run holds."""
    union = lib.pykvm_exit_payload(run)
    decoder = _DECODERS.get(run.exit_reason)
    if decoder is None:
        return Unknown(run.exit_reason, ffi.buffer(union, 64)[:])
    return decoder(run, union)
