"""Decoders of struct kvm_run, and the exits that only KVM has.

Exit reasons that nothing here decodes arrive as `Unsupported`, with their number: nothing is
swallowed, and a kernel may be newer than pykvm. `register_exit` adds decoders.

Source: Documentation/virt/kvm/api.rst chapter 5 ("The kvm_run structure").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pykvm.kvm.exits import (
    Debug,
    Exit,
    Hlt,
    Hypercall,
    Io,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
    SystemEventKind,
)
from pykvm.kvm.native import Struct, ffi, lib

__all__ = [
    "Decoder",
    "FailEntry",
    "InternalError",
    "InternalErrorKind",
    "Intr",
    "Unknown",
    "Unsupported",
    "decode_exit",
    "exit_name",
    "register_exit",
]


# ---- exits of KVM alone --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unknown(Exit):
    """KVM_EXIT_UNKNOWN: an exit reason of the processor that KVM does not handle."""

    hardware_reason: int

    def __str__(self) -> str:
        return f"unknown exit of the processor, reason {self.hardware_reason:#x}"


@dataclass(frozen=True, slots=True)
class Unsupported(Exit):
    """Exit that pykvm does not decode.

    Attributes:
        number: the exit reason.
        payload: the first 64 bytes of kvm_run's union.
    """

    number: int
    payload: bytes

    def __str__(self) -> str:
        return f"{exit_name(self.number)}, payload {self.payload[:32].hex()}"


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


class InternalErrorKind(IntEnum):
    """KVM_INTERNAL_ERROR_*."""

    EMULATION = lib.KVM_INTERNAL_ERROR_EMULATION
    SIMUL_EX = lib.KVM_INTERNAL_ERROR_SIMUL_EX
    DELIVERY_EV = lib.KVM_INTERNAL_ERROR_DELIVERY_EV
    UNEXPECTED_EXIT_REASON = lib.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON


@dataclass(frozen=True, slots=True)
class InternalError(Exit):
    """KVM could not go on.

    Attributes:
        suberror: an `InternalErrorKind`, or a newer number.
        data: words whose meaning depends on the suberror. For an instruction that KVM failed to
            emulate, the first holds flags, and the instruction follows where its bit 0 is set
            (struct kvm_run.emulation_failure).
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


# ---- names ---------------------------------------------------------------------------------------


def _exit_names() -> dict[int, str]:
    parts_of_others = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_")
    return {
        getattr(lib, name): name
        for name in dir(lib)
        if name.startswith("KVM_EXIT_") and not name.startswith(parts_of_others)
    }


_EXIT_NAMES = _exit_names()


def exit_name(reason: int) -> str:
    """Return the macro's name, or "exit reason N" where linux/kvm.h has none."""
    return _EXIT_NAMES.get(reason, f"exit reason {reason}")


# ---- decoding ------------------------------------------------------------------------------------


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


_SYSTEM_EVENTS = {
    getattr(lib, f"KVM_SYSTEM_EVENT_{kind.name}"): kind
    for kind in SystemEventKind
    if hasattr(lib, f"KVM_SYSTEM_EVENT_{kind.name}")
}


def _system_event(run: Struct, union: Struct) -> Exit:
    event = ffi.cast("kvm_exit_system_event *", union)
    data = lib.pykvm_system_event_data(run)
    kind = _SYSTEM_EVENTS.get(event.type, event.type)
    return SystemEvent(kind, tuple(data[0 : min(event.ndata, 16)]))


Decoder = Callable[[Struct, Struct], Exit]
"""Takes the struct kvm_run, and a pointer to its union."""

_DECODERS: dict[int, Decoder] = {
    lib.KVM_EXIT_UNKNOWN: lambda _run, union: Unknown(
        ffi.cast("kvm_exit_hw *", union).hardware_exit_reason
    ),
    lib.KVM_EXIT_IO: _io,
    lib.KVM_EXIT_HYPERCALL: _hypercall,
    lib.KVM_EXIT_DEBUG: _debug,
    lib.KVM_EXIT_HLT: lambda _run, _union: Hlt(),
    lib.KVM_EXIT_MMIO: _mmio,
    lib.KVM_EXIT_SHUTDOWN: lambda _run, _union: Shutdown(),
    lib.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    lib.KVM_EXIT_INTR: lambda _run, _union: Intr(),
    lib.KVM_EXIT_INTERNAL_ERROR: _internal,
    lib.KVM_EXIT_SYSTEM_EVENT: _system_event,
}


def register_exit(reason: int, name: str, decoder: Decoder) -> None:
    """Decode an exit reason of an architecture, or of a kernel patch, from now on.

    Args:
        reason: its number.
        name: the name that `exit_name` returns for it.
        decoder: makes the exit.
    """
    _EXIT_NAMES[reason] = name
    _DECODERS[reason] = decoder


def decode_exit(run: Struct) -> Exit:
    """Return the exit that a struct kvm_run holds."""
    union = lib.pykvm_exit_payload(run)
    decoder = _DECODERS.get(run.exit_reason)
    if decoder is None:
        return Unsupported(run.exit_reason, ffi.buffer(union, 64)[:])
    return decoder(run, union)
