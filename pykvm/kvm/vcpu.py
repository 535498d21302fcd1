"""`Vcpu`: the handle on one virtual processor, and its run loop.

`Vcpu.run` goes into C (`run_loop.c`) without the GIL and comes back for exits that Python must
see. Hypercalls with a native handler and output to a console port are answered there.

Source: Documentation/virt/kvm/api.rst 4.10 and chapter 5.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.errors import (
    ConsoleError,
    HandleClosedError,
    HypercallNumberError,
    IoctlError,
    KvmError,
    ReplyError,
    UnexpectedExitError,
    VcpuRunningError,
)
from pykvm.kvm.exits import Exit, Stopped, decode_exit, exit_name
from pykvm.kvm.handle import Struct
from pykvm.kvm.ioctls import IOCTLS, Capability, Ioctl, Scope
from pykvm.kvm.report import describe
from pykvm.kvm.state import VcpuState
from pykvm.kvm.stats import Stats

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm

__all__ = ["NULL_HYPERCALL", "CoalescedWrite", "ExitCounts", "PastExit", "Vcpu"]

PAGE_SIZE = 4096

NULL_HYPERCALL: Any = lib.pykvm_null_hypercall
"""A native handler that returns 0, for `Vcpu.set_hypercall`."""


@dataclass(frozen=True, slots=True)
class ExitCounts:
    """Exits since the vCPU was made, by the names of exits.

    runs: KVM_RUN calls. interrupted: those that a signal or stop() ended. native: answered by the
    C loop. returned: handed to Python.
    """

    runs: int
    interrupted: int
    native: dict[str, int]
    returned: dict[str, int]


@dataclass(frozen=True, slots=True)
class PastExit:
    """One of the last exits. first: port, address, hypercall or MSR; second: data."""

    name: str
    native: bool
    first: int
    second: int

    def __str__(self) -> str:
        where = "answered by the loop" if self.native else "returned"
        return f"{self.name} {self.first:#x} {self.second:#x} ({where})"


@dataclass(frozen=True, slots=True)
class CoalescedWrite:
    """A write that KVM queued (`Vm.coalesce`)."""

    address: int
    data: bytes
    port: bool


class Vcpu(VcpuState):
    """A virtual processor. One thread at a time runs it; any thread may stop it.

    State is read and written between runs: calls made while another thread is inside run() raise
    VcpuRunningError instead of waiting for the guest.
    """

    scope: ClassVar[Scope] = Scope.VCPU

    def __init__(self, vm: Vm, fd: int, vcpu_id: int, run_size: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        raw = lib.pykvm_vcpu_new(fd, run_size)  # owns fd from here on
        if raw == ffi.NULL:
            raise KvmError(
                f"cannot map the run area of vcpu {vcpu_id}: free some memory", ffi.errno
            )
        self._vcpu = ffi.gc(raw, lib.pykvm_vcpu_free)
        self._run = lib.pykvm_vcpu_run_area(self._vcpu)
        self._kept: dict[int, tuple[Any, Any]] = {}
        super().__init__(fd)

    def close(self) -> None:
        """Stop the vCPU, wait until it has left run(), and give its descriptor back."""
        if self._fd >= 0:
            if lib.pykvm_vcpu_close(self._vcpu):
                raise VcpuRunningError("a hypercall handler cannot close its own vcpu: use stop()")
            self._fd = -1

    def check_extension(self, capability: str | int | Capability) -> int:
        return self.vm.check_extension(capability)

    def _raw_ioctl(self, entry: Ioctl, arg: Any = 0) -> int:
        # The kernel would let the call wait until the guest stops by itself.
        if lib.pykvm_is_running(self._vcpu):
            raise VcpuRunningError(
                f"{entry.name} on vcpu {self.id} while it runs: call stop() and wait for run()"
            )
        return super()._raw_ioctl(entry, arg)

    # ---- running ----------------------------------------------------------------------------
    def run(self) -> Exit:
        """Run the guest until an exit that the C loop does not answer.

        Returns the exit; `Stopped` after stop(), also when stop() came before run(). Signal
        handlers of Python run meanwhile, so Ctrl-C raises KeyboardInterrupt here. Raises
        VcpuRunningError, HandleClosedError, IoctlError (KVM_RUN).
        """
        while True:
            result = lib.pykvm_run(self._vcpu)
            if result == lib.PYKVM_RUN_EXIT:
                found = decode_exit(self._run)
                if self.closed:  # by another thread, while this one was decoding
                    raise HandleClosedError(f"vcpu {self.id} was closed: create another one")
                return found
            if result == lib.PYKVM_RUN_STOPPED:
                return Stopped()
            if result == lib.PYKVM_RUN_BUSY:
                raise VcpuRunningError(f"vcpu {self.id} runs in another thread: stop() it first")
            if result == lib.PYKVM_RUN_CLOSED:
                raise HandleClosedError(f"vcpu {self.id} was closed: create another one")
            if result != lib.PYKVM_RUN_SIGNAL:
                raise IoctlError(IOCTLS["KVM_RUN"], -result)
            # PYKVM_RUN_SIGNAL: the interpreter runs signal handlers before it loops.

    def stop(self) -> None:
        """Make run() return `Stopped`, now or the next time. From any thread; never waits.

        Several stops before one return of run() count as one. Harmless after close().
        """
        lib.pykvm_stop(self._vcpu)

    @property
    def running(self) -> bool:
        """Whether some thread is inside run()'s C loop."""
        return bool(lib.pykvm_is_running(self._vcpu))

    def complete(self) -> None:
        """Let KVM finish the last exit (a reply, a port access) without running the guest on.

        Needed before registers are read or saved after `Io`, `MmioRead`, ... (api.rst 5).
        """
        self.stop()
        found = self.run()
        if not isinstance(found, Stopped):
            raise self.unexpected(found)

    def reply(self, value: int | bytes) -> None:
        """Answer the last exit: `Io` input, `MmioRead`, `Hypercall` or `Rdmsr`.

        Bytes for Io and MmioRead must have the exit's length; a number is little-endian. Raises
        ReplyError for an exit that takes no answer, or a length that is not the exit's.
        """
        reason = self._run.exit_reason
        union = lib.pykvm_exit_payload(self._run)
        if reason == lib.KVM_EXIT_IO:
            io = ffi.cast("kvm_exit_io *", union)
            if io.direction == lib.KVM_EXIT_IO_IN:
                target = ffi.cast("char *", self._run) + io.data_offset
                return self._put(target, io.size * io.count, value)
        elif reason == lib.KVM_EXIT_MMIO:
            mmio = ffi.cast("kvm_exit_mmio *", union)
            if not mmio.is_write:
                return self._put(mmio.data, mmio.len, value)
        elif isinstance(value, int):
            if reason == lib.KVM_EXIT_HYPERCALL:
                ffi.cast("kvm_exit_hypercall *", union).ret = value % 2**64
                return None
            if reason == lib.KVM_EXIT_X86_RDMSR:
                msr = ffi.cast("kvm_exit_msr *", union)
                msr.error, msr.data = 0, value % 2**64
                return None
        raise ReplyError(
            f"{exit_name(reason)} takes no such reply: reply to in, mmio read, hypercall or rdmsr"
        )

    def reply_fault(self) -> None:
        """Answer `Rdmsr` or `Wrmsr` with a general-protection exception in the guest."""
        if self._run.exit_reason not in (lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR):
            raise ReplyError(
                f"{exit_name(self._run.exit_reason)} cannot fault: "
                "use reply_fault() after rdmsr and wrmsr"
            )
        ffi.cast("kvm_exit_msr *", lib.pykvm_exit_payload(self._run)).error = 1

    @staticmethod
    def _put(target: Any, size: int, value: int | bytes) -> None:
        data = (value % 256**size).to_bytes(size, "little") if isinstance(value, int) else value
        if len(data) != size:
            raise ReplyError(f"a reply of {len(data)} bytes to an access of {size}: pass {size}")
        ffi.buffer(target, size)[:] = data

    # ---- struct kvm_run ---------------------------------------------------------------------
    def request_irq_window(self, wanted: bool) -> None:
        """Leave with `IrqWindow` when the guest takes interrupts (no in-kernel local APIC)."""
        self._run.request_interrupt_window = int(wanted)

    @property
    def ready_for_interrupt(self) -> bool:
        """Whether `interrupt()` would be taken now."""
        return bool(self._run.ready_for_interrupt_injection)

    @property
    def kvm_run(self) -> Struct:
        """struct kvm_run itself: cr8, apic_base, if_flag, flags. Zeros after close()."""
        return self._run

    def coalesced_writes(self) -> list[CoalescedWrite]:
        """Take the queued writes (`Vm.coalesce`), oldest first."""
        page = self.require("KVM_CAP_COALESCED_MMIO", "coalesced_writes()")
        start = ffi.cast("char *", self._run) + page * PAGE_SIZE
        ring = ffi.cast("struct kvm_coalesced_mmio_ring *", start)
        entry_size = ffi.sizeof("struct kvm_coalesced_mmio")
        entries = (PAGE_SIZE - ffi.sizeof("struct kvm_coalesced_mmio_ring")) // entry_size
        result = []
        while ring.first != ring.last:
            entry = ring.coalesced_mmio[ring.first]
            data = bytes(entry.data[0 : entry.len])
            result.append(CoalescedWrite(entry.phys_addr, data, bool(entry.pio)))
            ring.first = (ring.first + 1) % entries
        return result

    # ---- the C loop's work ------------------------------------------------------------------
    def set_hypercall(self, number: int, function: Any, context: Any = None) -> None:
        """Answer a hypercall in C, without Python.

        function: a C function ``uint64_t (*)(void *ctx, const uint64_t args[6])``, as a cffi
        pointer (of any FFI) or an address; None removes it. context: its first argument, a cffi
        pointer or an address. Both are kept alive. args: rbx, rcx, rdx, rsi; the result becomes
        rax. Stock KVM hands few hypercalls to user space; see `pykvm.elisa.calls`. Raises
        HypercallNumberError (more than 16), VcpuRunningError.
        """
        pointer = ffi.cast("pykvm_hypercall_fn", 0 if function is None else function)
        ctx = ffi.cast("void *", 0 if context is None else context)
        self._changed(lib.pykvm_set_hypercall(self._vcpu, number, pointer, ctx))
        self._kept[number] = (function, context)

    def console(self, port: int, *, size: int | None = None) -> None:
        """Collect what the guest writes to a port (at most four ports, one buffer).

        size: bytes of the buffer, 65536 by default, fixed by the first call; what does not fit is
        dropped and counted. Raises ConsoleError, VcpuRunningError.
        """
        if size is not None:
            self._changed(lib.pykvm_console_size(self._vcpu, size))
        self._changed(lib.pykvm_console_port(self._vcpu, port))

    def read_console(self) -> bytes:
        """Take what has been collected; from any thread, also while the vCPU runs."""
        chunk = ffi.new("char[]", PAGE_SIZE)
        result = b""
        while n := lib.pykvm_console_read(self._vcpu, chunk, PAGE_SIZE):
            result += ffi.buffer(chunk, n)[:]
        return result

    @property
    def console_dropped(self) -> int:
        """Bytes lost because nobody called read_console() in time."""
        return int(lib.pykvm_vcpu_counts(self._vcpu).console_dropped)

    def _changed(self, result: int) -> None:
        if result == 0:
            return
        messages: dict[str, tuple[type[Exception], str]] = {
            "EBUSY": (VcpuRunningError, "is running: call stop() and wait for run()"),
            "EBADF": (HandleClosedError, "is closed: create another one"),
            "E2BIG": (HypercallNumberError, "answers 16 hypercalls: join some"),
            "ENOSPC": (ConsoleError, f"has {lib.PYKVM_CONSOLE_PORTS} console ports: share one"),
            "EEXIST": (ConsoleError, "has a buffer already: give the size with the first port"),
            "EINVAL": (ConsoleError, "cannot have an empty buffer: pass a size of 1 or more"),
        }
        kind, text = messages.get(_errno_name(-result), (MemoryError, "is out of memory"))
        raise kind(f"vcpu {self.id} {text}")

    def exit_counts(self) -> ExitCounts:
        """What the loop has seen so far; may be read while it runs."""
        counts = lib.pykvm_vcpu_counts(self._vcpu)
        return ExitCounts(
            runs=counts.runs,
            interrupted=counts.interrupted,
            native=_named(counts.native),
            returned=_named(counts.returned),
        )

    def last_exits(self) -> list[PastExit]:
        """Up to 16 exits, oldest first."""
        counts = lib.pykvm_vcpu_counts(self._vcpu)
        seen: int = counts.history_next
        size: int = lib.PYKVM_HISTORY
        entries = (counts.history[i % size] for i in range(max(seen - size, 0), seen))
        return [PastExit(exit_name(e.reason), bool(e.native), e.first, e.second) for e in entries]

    # ---- observing --------------------------------------------------------------------------
    def stats(self) -> Stats:
        """KVM's counters of this vCPU ("exits" among them). Open them before run()."""
        return self.vm.adopt(Stats(self.ioctl("KVM_GET_STATS_FD")))

    def unexpected(self, found: Exit) -> UnexpectedExitError:
        """The error to raise for an exit that the caller has no use for."""
        return UnexpectedExitError(found, describe(self, found))


def _named(counts: Sequence[int]) -> dict[str, int]:
    return {exit_name(reason): count for reason, count in enumerate(counts) if count}


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))
