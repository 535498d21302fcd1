"""`Vcpu`: the handle on one virtual processor, and its run loop.

`Vcpu.run` goes into C (``native/run_loop.c``) without the GIL and comes back for exits that no
native handler serves (`pykvm.kvm.handlers`).

Source: Documentation/virt/kvm/api.rst 4.10 and chapter 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pykvm.kvm.errors import (
    HandleClosedError,
    IoctlError,
    KvmError,
    ReplyError,
    UnexpectedExitError,
    VcpuRunningError,
)
from pykvm.kvm.exits import Exit, Stopped
from pykvm.kvm.handlers import Handlers, VcpuHandlers
from pykvm.kvm.ioctls import Ioctl, Scope
from pykvm.kvm.memory_slots import MemorySlots
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.kvm.native.decoders import decode_exit, exit_name
from pykvm.kvm.stats import Stats
from pykvm.kvm.x86.report import describe
from pykvm.kvm.x86.vcpu import X86Vcpu
from pykvm.sizes import PAGE_SIZE

__all__ = ["CoalescedWrite", "ExitCounts", "PastExit", "Vcpu"]


@dataclass(frozen=True, slots=True)
class ExitCounts:
    """Exits since the vCPU was made, by the names of exits.

    Attributes:
        runs: KVM_RUN calls.
        interrupted: those that a signal or `Vcpu.stop` ended.
        native: exits that native handlers served.
        returned: exits that `Vcpu.run` returned.
    """

    runs: int
    interrupted: int
    native: dict[str, int]
    returned: dict[str, int]


@dataclass(frozen=True, slots=True)
class PastExit:
    """One of the last exits.

    Attributes:
        name: the exit's name.
        native: whether a native handler served it.
        first: port, address, hypercall or MSR.
        second: data.
    """

    name: str
    native: bool
    first: int
    second: int

    def __str__(self) -> str:
        where = "served by a handler" if self.native else "returned"
        return f"{self.name} {self.first:#x} {self.second:#x} ({where})"


@dataclass(frozen=True, slots=True)
class CoalescedWrite:
    """A write that KVM queued (`Vm.register_coalesced_mmio`)."""

    address: int
    data: bytes
    port: bool


class Vcpu(X86Vcpu):
    """A virtual processor. One thread at a time runs it; any thread may stop it.

    State is read and written between runs: calls made while another thread is inside `run` raise
    VcpuRunningError instead of waiting for the guest. Made by `Vm.create_vcpu`.

    Attributes:
        vm: the handle on its VM.
        id: its APIC id.
    """

    scope: ClassVar[Scope] = Scope.VCPU

    def __init__(
        self, vm: MemorySlots, fd: int, vcpu_id: int, run_size: int, handlers: Handlers
    ) -> None:
        self.id = vcpu_id
        self.vm = vm
        raw = lib.pykvm_vcpu_new(fd, run_size)  # owns fd from here on
        if raw == ffi.NULL:
            raise KvmError(
                f"cannot map the run area of vcpu {vcpu_id}", "free some memory", errno=ffi.errno
            )
        self._vcpu = ffi.gc(raw, lib.pykvm_vcpu_free)
        self._run = lib.pykvm_vcpu_run_area(self._vcpu)
        super().__init__(fd, vm)
        self._handlers = VcpuHandlers(self._vcpu)
        handlers.add_vcpu(self._handlers)

    def close(self) -> None:
        """Stop the vCPU, wait until it has left `run`, and close its descriptor.

        Raises:
            VcpuRunningError: a native handler of this vCPU called: it would wait for itself.
        """
        if self._fd >= 0 and not self.inherited and lib.pykvm_vcpu_close(self._vcpu):
            raise VcpuRunningError("a handler cannot close its own vcpu", "use stop()")
        super().close()

    def _give_back(self, fd: int) -> None:
        # pykvm_vcpu_close() has given everything back, unless the vCPU is the parent process's.
        if self.inherited:
            lib.pykvm_vcpu_leave(self._vcpu)

    def _raw_ioctl(self, entry: Ioctl, arg: Any = 0) -> int:
        # The kernel would let the call wait until the guest stops by itself.
        self.require_own(f"{entry.name} on vcpu {self.id}")
        if lib.pykvm_is_running(self._vcpu):
            raise VcpuRunningError(
                f"{entry.name} on vcpu {self.id} while it runs", "call stop() and wait for run()"
            )
        return super()._raw_ioctl(entry, arg)

    # ---- running ----------------------------------------------------------------------------
    def run(self) -> Exit:
        """Run the guest until an exit that no native handler serves.

        Python's signal handlers run meanwhile, so Ctrl-C raises KeyboardInterrupt here.

        Returns:
            The exit; `Stopped` after `stop`, also when that came before `run`.

        Raises:
            VcpuRunningError: another thread runs the vCPU.
            HandleClosedError: the vCPU is closed, or was closed meanwhile.
            ForkedProcessError: the vCPU belongs to the parent process.
            IoctlError: KVM_RUN failed.
        """
        while True:
            self.require_own(f"run() of vcpu {self.id}")
            result = lib.pykvm_run(self._vcpu)
            if result == lib.PYKVM_RUN_EXIT:
                found = decode_exit(self._run)
                if self.closed:  # by another thread, while this one was decoding
                    raise self._closed_error()
                return found
            if result == lib.PYKVM_RUN_STOPPED:
                return Stopped()
            if result == lib.PYKVM_RUN_BUSY:
                raise VcpuRunningError(f"vcpu {self.id} runs in another thread", "stop() it first")
            if result == lib.PYKVM_RUN_CLOSED:
                raise self._closed_error()
            if result != lib.PYKVM_RUN_SIGNAL:
                raise IoctlError("KVM_RUN", -result)
            # PYKVM_RUN_SIGNAL: the interpreter runs signal handlers before it loops.

    def _closed_error(self) -> HandleClosedError:
        return HandleClosedError(f"vcpu {self.id} was closed", "create another one")

    def stop(self) -> None:
        """Make `run` return `Stopped`, now or the next time. From any thread; never waits.

        Several stops before one return of `run` count as one. Harmless after `close`.

        Raises:
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        self.require_own(f"stop() of vcpu {self.id}")
        lib.pykvm_stop(self._vcpu)

    @property
    def running(self) -> bool:
        """True while some thread of this process is inside run()'s C loop."""
        return not self.inherited and bool(lib.pykvm_is_running(self._vcpu))

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

        Args:
            value: bytes of the exit's length for `Io` and `MmioRead`, or a number, which is stored
                little-endian.

        Raises:
            ReplyError: the exit takes no such answer, or the length is not the exit's.
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        run = self.kvm_run
        reason = run.exit_reason
        union = lib.pykvm_exit_payload(run)
        if reason == lib.KVM_EXIT_IO:
            io = ffi.cast("kvm_exit_io *", union)
            if io.direction == lib.KVM_EXIT_IO_IN:
                target = ffi.cast("char *", run) + io.data_offset
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
            f"{exit_name(reason)} takes no such reply",
            "reply to in, mmio read, hypercall or rdmsr",
        )

    def reply_fault(self) -> None:
        """Answer `Rdmsr` or `Wrmsr` with a general-protection exception in the guest.

        Raises:
            ReplyError: the last exit is neither.
            ForkedProcessError: the vCPU belongs to the parent process.
        """
        run = self.kvm_run
        if run.exit_reason not in (lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR):
            raise ReplyError(
                f"{exit_name(run.exit_reason)} cannot fault",
                "use reply_fault() after rdmsr and wrmsr",
            )
        ffi.cast("kvm_exit_msr *", lib.pykvm_exit_payload(run)).error = 1

    @staticmethod
    def _put(target: Any, size: int, value: int | bytes) -> None:
        data = (value % 256**size).to_bytes(size, "little") if isinstance(value, int) else value
        if len(data) != size:
            raise ReplyError(f"a reply of {len(data)} bytes to an access of {size}", f"pass {size}")
        ffi.buffer(target, size)[:] = data

    # ---- struct kvm_run ---------------------------------------------------------------------
    @property
    def kvm_run(self) -> Struct:
        """struct kvm_run itself: cr8, apic_base, if_flag, flags. Zeros after `close`.

        Raises:
            ForkedProcessError: the page is shared with the parent process, which runs the vCPU.
        """
        self.require_own(f"kvm_run of vcpu {self.id}")
        return self._run

    def request_irq_window(self, wanted: bool) -> None:
        """Leave with `IrqWindow` when the guest takes interrupts (no in-kernel local APIC)."""
        self.kvm_run.request_interrupt_window = int(wanted)

    @property
    def ready_for_interrupt(self) -> bool:
        """True if the guest would take an `interrupt()` now."""
        return bool(self.kvm_run.ready_for_interrupt_injection)

    def coalesced_writes(self) -> list[CoalescedWrite]:
        """Take the queued writes (`Vm.register_coalesced_mmio`), oldest first."""
        page = self.require("KVM_CAP_COALESCED_MMIO", "coalesced_writes()")
        start = ffi.cast("char *", self.kvm_run) + page * PAGE_SIZE
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

    # ---- observing --------------------------------------------------------------------------
    def exit_counts(self) -> ExitCounts:
        """Return what the loop has seen so far; may be read while it runs."""
        counts = lib.pykvm_vcpu_counts(self._vcpu)
        return ExitCounts(
            runs=counts.runs,
            interrupted=counts.interrupted,
            native=_named(counts.native),
            returned=_named(counts.returned),
        )

    def last_exits(self) -> list[PastExit]:
        """Return up to 16 exits, oldest first."""
        counts = lib.pykvm_vcpu_counts(self._vcpu)
        seen: int = counts.history_next
        size: int = lib.PYKVM_HISTORY
        entries = (counts.history[i % size] for i in range(max(seen - size, 0), seen))
        return [PastExit(exit_name(e.reason), bool(e.native), e.first, e.second) for e in entries]

    def stats(self) -> Stats:
        """Open KVM's counters of this vCPU ("exits" among them), before run().

        They close with the VM.
        """
        return self.vm.adopt(Stats(self.ioctl("KVM_GET_STATS_FD")))

    def unexpected(self, found: Exit) -> UnexpectedExitError:
        """Return the error to raise for an exit that the caller has no use for."""
        past = self.last_exits()
        report = describe(self, self.id, found, past, self.vm.read_physical)
        return UnexpectedExitError(found, report)


def _named(counts: Sequence[int]) -> dict[str, int]:
    return {exit_name(reason): count for reason, count in enumerate(counts) if count}
