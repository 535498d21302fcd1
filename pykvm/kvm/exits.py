"""Reasons why a vCPU stopped running, one small class each: those that any hypervisor could give.

Those of KVM alone are in `pykvm.kvm.native.decoders`, those of x86 in `pykvm.kvm.x86.exits`.

Source: Documentation/virt/kvm/api.rst chapter 5 ("The kvm_run structure").
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "Debug",
    "Exit",
    "Hlt",
    "Hypercall",
    "Io",
    "MmioRead",
    "MmioWrite",
    "Shutdown",
    "Stopped",
    "SystemEvent",
    "SystemEventKind",
]


class Exit:
    """Base class of all exits; ``str()`` of one is a line for a reader."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Stopped(Exit):
    """`Vcpu.stop` was called. The guest goes on where it was at the next run()."""

    def __str__(self) -> str:
        return "stopped"


@dataclass(frozen=True, slots=True)
class Io(Exit):
    """Port input or output. Input needs a `Vcpu.reply` before the next run.

    Attributes:
        port: the port.
        size: bytes of one access.
        count: accesses, one after the other.
        is_write: whether it is output.
        data: what the guest wrote, size * count bytes; empty for input.
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
    """Read of guest physical memory that no slot holds; needs a `Vcpu.reply`."""

    address: int
    size: int

    def __str__(self) -> str:
        return f"read of {self.size} bytes at GPA {self.address:#x}, where no memory is"


@dataclass(frozen=True, slots=True)
class MmioWrite(Exit):
    """Write to guest physical memory that no slot holds, or to a read-only slot."""

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
    """Hypercall for user space that no handler serves; needs a `Vcpu.reply` with its result."""

    number: int
    args: tuple[int, ...]
    long_mode: bool

    def __str__(self) -> str:
        return f"hypercall {self.number:#x}({', '.join(f'{arg:#x}' for arg in self.args)})"


@dataclass(frozen=True, slots=True)
class Debug(Exit):
    """Single step, breakpoint or watchpoint (see `Vcpu.set_guest_debug`).

    Attributes:
        exception: 1 for #DB, 3 for #BP.
        pc: the instruction's address.
        dr6: bits 0 to 3 for the breakpoints, bit 14 for a single step.
        dr7: as the guest sees it.
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
    """HLT, where no interrupt controller of the hypervisor waits for the interrupt."""

    def __str__(self) -> str:
        return "hlt"


@dataclass(frozen=True, slots=True)
class Shutdown(Exit):
    """Triple fault, or another event that resets the processor."""

    def __str__(self) -> str:
        return "shutdown (triple fault)"


class SystemEventKind(Enum):
    """A request of the whole VM."""

    SHUTDOWN = "shutdown"
    RESET = "reset"
    CRASH = "crash"
    WAKEUP = "wakeup"
    SUSPEND = "suspend"
    SEV_TERM = "sev term"


@dataclass(frozen=True, slots=True)
class SystemEvent(Exit):
    """Request of the whole VM.

    Attributes:
        kind: the request; a number where the hypervisor is newer than pykvm.
        data: words whose meaning depends on the kind.
    """

    kind: SystemEventKind | int
    data: tuple[int, ...]

    def __str__(self) -> str:
        if isinstance(self.kind, SystemEventKind):
            return f"system event: {self.kind.value}"
        return f"system event {self.kind}"
