"""The part of `Vcpu` that x86 alone has: registers, events, CPUID, MSRs, time, debugging.

Structs are cffi's: read one, change its fields, write it back::

    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)

Source: Documentation/virt/kvm/api.rst, "Type: vcpu ioctl".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from pykvm.kvm.device import Attributes
from pykvm.kvm.errors import BreakpointError, StateSizeError
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.kvm.x86.cpuid import CpuidEntry, pack_cpuid, read_cpuid
from pykvm.kvm.x86.msr import read_msrs, read_readable_msrs, write_msrs
from pykvm.kvm.x86.system import X86System

__all__ = ["Breakpoint", "MpState", "Translation", "X86Vcpu"]


class MpState(IntEnum):
    """KVM_MP_STATE_* that x86 knows."""

    RUNNABLE = lib.KVM_MP_STATE_RUNNABLE
    UNINITIALIZED = lib.KVM_MP_STATE_UNINITIALIZED
    INIT_RECEIVED = lib.KVM_MP_STATE_INIT_RECEIVED
    HALTED = lib.KVM_MP_STATE_HALTED
    SIPI_RECEIVED = lib.KVM_MP_STATE_SIPI_RECEIVED
    AP_RESET_HOLD = lib.KVM_MP_STATE_AP_RESET_HOLD


@dataclass(frozen=True, slots=True)
class Translation:
    """A guest virtual address, walked through the guest's page tables."""

    physical: int
    writable: bool
    user: bool


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A hardware breakpoint or watchpoint: kind "execute", "write" or "access", size 1, 2, 4, 8."""

    address: int
    kind: str = "execute"
    size: int = 1


# DR7 fields (SDM vol. 3B 18.2.4).
_DR7_KINDS = {"execute": 0, "write": 1, "access": 3}
_DR7_SIZES = {1: 0, 2: 1, 4: 3, 8: 2}
_DR7_ALWAYS_ONE = 1 << 10
_DR7_GLOBAL_EXACT = 1 << 9
_REINJECT = {1: lib.KVM_GUESTDBG_INJECT_DB, 3: lib.KVM_GUESTDBG_INJECT_BP}


class X86Vcpu(Attributes):
    """The state of a vCPU. Not while it runs."""

    # ---- registers --------------------------------------------------------------------------
    def get_regs(self) -> Struct:
        """Return struct kvm_regs: rax to r15, rip, rflags."""
        return self._get("KVM_GET_REGS", "kvm_regs")

    def set_regs(self, regs: Struct | None = None, **values: int) -> None:
        """Set all of struct kvm_regs, or the named registers: ``set_regs(rip=0x1000)``."""
        regs = self.get_regs() if regs is None else regs
        for name, value in values.items():
            setattr(regs, name, value)
        self.ioctl("KVM_SET_REGS", regs)

    def get_sregs(self) -> Struct:
        """Return struct kvm_sregs: segments, descriptor tables, control registers, EFER."""
        return self._get("KVM_GET_SREGS", "kvm_sregs")

    def set_sregs(self, sregs: Struct) -> None:
        """Set all of struct kvm_sregs; call `set_cpuid2` first.

        Newer kernels refuse EFER.LME, LMA and NX of a vCPU whose CPUID lacks long mode or NX
        (Linux arch/x86/kvm, kvm_is_valid_sregs(): seen in 6.12.117, not in 6.1.192).
        """
        self.ioctl("KVM_SET_SREGS", sregs)

    def get_sregs2(self) -> Struct:
        """Return struct kvm_sregs2: as kvm_sregs, with PDPTRs and without the interrupt bitmap."""
        return self._get("KVM_GET_SREGS2", "kvm_sregs2")

    def set_sregs2(self, sregs: Struct) -> None:
        """Set all of struct kvm_sregs2."""
        self.ioctl("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> Struct:
        """Return struct kvm_fpu: x87 and SSE."""
        return self._get("KVM_GET_FPU", "kvm_fpu")

    def set_fpu(self, fpu: Struct) -> None:
        """Set all of struct kvm_fpu."""
        self.ioctl("KVM_SET_FPU", fpu)

    def get_xsave(self) -> bytes:
        """Return the XSAVE area (SDM vol. 1, 13.4), 4096 bytes or KVM_CAP_XSAVE2's size."""
        area = ffi.new("char[]", self._xsave_size())
        newer = self.check_extension("KVM_CAP_XSAVE2")
        self.ioctl("KVM_GET_XSAVE2" if newer else "KVM_GET_XSAVE", area)
        return ffi.buffer(area)[:]

    def set_xsave(self, area: bytes) -> None:
        """Write back what `get_xsave` gave.

        Raises:
            StateSizeError: the length is another one.
        """
        _require_size("an xsave area", area, self._xsave_size())
        self.ioctl("KVM_SET_XSAVE", ffi.from_buffer(area))

    def _xsave_size(self) -> int:
        return max(self.check_extension("KVM_CAP_XSAVE2"), ffi.sizeof("struct kvm_xsave"))

    def get_xcrs(self) -> dict[int, int]:
        """Return extended control registers, number to value; XCR0 is 0."""
        xcrs = self._get("KVM_GET_XCRS", "kvm_xcrs")
        return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """Set extended control registers.

        Raises:
            StateSizeError: there are more than KVM has.
        """
        xcrs = ffi.new("struct kvm_xcrs *")
        if len(values) > len(xcrs.xcrs):
            raise StateSizeError(
                f"{len(values)} extended control registers", f"pass at most {len(xcrs.xcrs)}"
            )
        xcrs.nr_xcrs = len(values)
        for slot, (number, value) in enumerate(values.items()):
            xcrs.xcrs[slot].xcr = number
            xcrs.xcrs[slot].value = value
        self.ioctl("KVM_SET_XCRS", xcrs)

    def get_debug_regs(self) -> Struct:
        """Return struct kvm_debugregs: db[4], dr6, dr7."""
        return self._get("KVM_GET_DEBUGREGS", "kvm_debugregs")

    def set_debug_regs(self, debugregs: Struct) -> None:
        """Set all of struct kvm_debugregs."""
        self.ioctl("KVM_SET_DEBUGREGS", debugregs)

    # ---- events -----------------------------------------------------------------------------
    def get_vcpu_events(self) -> Struct:
        """Return struct kvm_vcpu_events: pending and injected exceptions, interrupts, NMI, SMI."""
        return self._get("KVM_GET_VCPU_EVENTS", "kvm_vcpu_events")

    def set_vcpu_events(self, events: Struct) -> None:
        """Set events; events.flags: optional fields that count, ``lib.KVM_VCPUEVENT_VALID_*``."""
        self.ioctl("KVM_SET_VCPU_EVENTS", events)

    def get_mp_state(self) -> MpState:
        """Return whether the vCPU runs, is halted, or waits to be started."""
        return MpState(self._get("KVM_GET_MP_STATE", "kvm_mp_state").mp_state)

    def set_mp_state(self, state: MpState) -> None:
        """Let it run, halt, or wait to be started."""
        self.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", {"mp_state": int(state)}))

    def get_lapic(self) -> bytes:
        """Return the local APIC's registers, 1024 bytes."""
        return ffi.buffer(self._get("KVM_GET_LAPIC", "kvm_lapic_state"))[:]

    def set_lapic(self, registers: bytes) -> None:
        """Write back what `get_lapic` gave.

        Raises:
            StateSizeError: the length is another one.
        """
        state = ffi.new("struct kvm_lapic_state *")
        _require_size("a local apic", registers, len(ffi.buffer(state)))
        ffi.buffer(state)[:] = registers
        self.ioctl("KVM_SET_LAPIC", state)

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt, where no in-kernel local APIC does it."""
        self.ioctl("KVM_INTERRUPT", ffi.new("struct kvm_interrupt *", {"irq": vector}))

    def nmi(self) -> None:
        """Queue a non-maskable interrupt."""
        self.ioctl("KVM_NMI")

    def smi(self) -> None:
        """Queue a system-management interrupt."""
        self.ioctl("KVM_SMI")

    def report_tpr_access(self, enabled: bool) -> None:
        """Make accesses to the task-priority register `TprAccess` exits."""
        request = ffi.new("struct kvm_tpr_access_ctl *", {"enabled": int(enabled)})
        self.ioctl("KVM_TPR_ACCESS_REPORTING", request)

    def setup_mce(self, capabilities: int) -> None:
        """Give it machine-check banks, out of `Kvm.get_mce_cap_supported`."""
        self.ioctl("KVM_X86_SETUP_MCE", ffi.new("__u64 *", capabilities))

    # ---- CPUID, MSRs ------------------------------------------------------------------------
    def get_cpuid2(self) -> list[CpuidEntry]:
        """Return what the guest's CPUID gives."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_CPUID2", table))

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """Choose what the guest's CPUID gives; once, before the first `run`.

        Raises:
            IoctlError: the vCPU has run, the VM may not have a feature, or there are more leaves
                than KVM keeps (E2BIG).
        """
        self.ioctl("KVM_SET_CPUID2", pack_cpuid(entries))

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of MSRs by number.

        Raises:
            MsrError: KVM does not read one; it names the first.
        """
        return read_msrs(self._read_msrs, indices, self._listed_msrs)

    def get_readable_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of those MSRs that KVM reads, by number, in order."""
        return read_readable_msrs(self._read_msrs, indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set MSRs, in order.

        Raises:
            MsrError: KVM does not write one; it names the first. Those before it are set.
        """
        write_msrs(lambda table: self.ioctl("KVM_SET_MSRS", table), self._read_msrs, values)

    def _read_msrs(self, table: Struct) -> int:
        return self.ioctl("KVM_GET_MSRS", table)

    def _listed_msrs(self) -> list[int]:
        system = self.system
        return system.get_msr_index_list() if isinstance(system, X86System) else []

    def get_nested_state(self) -> bytes:
        """Return the state of the guest's own guests (struct kvm_nested_state), all its bytes."""
        size = self.require("KVM_CAP_NESTED_STATE", "get_nested_state()")
        area = ffi.new("char[]", size)
        state = ffi.cast("struct kvm_nested_state *", area)
        state.size = size
        self.ioctl("KVM_GET_NESTED_STATE", state)
        return ffi.buffer(area, state.size)[:]

    def set_nested_state(self, state: bytes) -> None:
        """Write back what `get_nested_state` gave.

        Raises:
            StateSizeError: the length is another one.
        """
        least = ffi.sizeof("struct kvm_nested_state")
        if len(state) < least:
            raise StateSizeError(f"{len(state)} bytes of nested state", f"pass {least} or more")
        area = ffi.new("char[]", state)
        said = ffi.cast("struct kvm_nested_state *", area).size
        _require_size("a nested state", state, said)
        self.ioctl("KVM_SET_NESTED_STATE", area)

    # ---- time -------------------------------------------------------------------------------
    def get_tsc_khz(self) -> int:
        """Return the frequency of the guest's TSC, kHz."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Set it: with a processor that scales the TSC, or close to the host's frequency."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    def has_tsc_offset(self) -> bool:
        """Return whether `get_tsc_offset` and `set_tsc_offset` work."""
        return self.has_device_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)

    def get_tsc_offset(self) -> int:
        """Return what is added to the host's (scaled) TSC, modulo 2**64."""
        raw = self.get_device_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, 8)
        return int(struct.unpack("<Q", raw)[0])

    def set_tsc_offset(self, offset: int) -> None:
        """Set what is added to the host's (scaled) TSC."""
        raw = struct.pack("<Q", offset % 2**64)
        self.set_device_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, raw)

    def kvmclock_ctrl(self) -> None:
        """Tell a guest that uses kvmclock that it was paused, so that no watchdog bites."""
        self.ioctl("KVM_KVMCLOCK_CTRL")

    # ---- debugging --------------------------------------------------------------------------
    def set_guest_debug(
        self,
        *,
        single_step: bool = False,
        breakpoints: Sequence[Breakpoint] = (),
        software_breakpoints: bool = False,
        block_interrupts: bool = False,
        reinject: int | None = None,
    ) -> None:
        """Make the guest leave with `Debug`; without arguments, stop debugging.

        Args:
            single_step: whether it leaves after every instruction.
            breakpoints: at most four.
            software_breakpoints: whether INT3 instructions leave too.
            block_interrupts: whether none is injected while single-stepping.
            reinject: vector of an exception of the last `Debug` exit that is the guest's own, and
                is now delivered to it: 1 or 3.

        Raises:
            BreakpointError: the processor has no such breakpoints.
            CapabilityMissingError: this KVM does not debug guests.
        """
        request = ffi.new("struct kvm_guest_debug *")
        if single_step:
            request.control |= lib.KVM_GUESTDBG_SINGLESTEP
        if software_breakpoints:
            request.control |= lib.KVM_GUESTDBG_USE_SW_BP
        if block_interrupts:
            request.control |= lib.KVM_GUESTDBG_BLOCKIRQ
        if breakpoints:
            request.control |= lib.KVM_GUESTDBG_USE_HW_BP
            request.arch.debugreg[7] = _debug_registers(request.arch.debugreg, breakpoints)
        if reinject is not None:
            request.control |= _REINJECT[reinject]
        if request.control:
            request.control |= lib.KVM_GUESTDBG_ENABLE
        self.ioctl("KVM_SET_GUEST_DEBUG", request)

    def translate_gva(self, address: int) -> Translation | None:
        """Walk the guest's page tables for a virtual address; None where nothing is mapped."""
        request = ffi.new("struct kvm_translation *", {"linear_address": address})
        self.ioctl("KVM_TRANSLATE", request)
        if not request.valid:
            return None
        return Translation(
            request.physical_address, bool(request.writeable), bool(request.usermode)
        )


def _debug_registers(registers: Struct, breakpoints: Sequence[Breakpoint]) -> int:
    """Fill DR0 to DR3; return DR7."""
    if len(breakpoints) > 4:
        raise BreakpointError(f"{len(breakpoints)} breakpoints", "use at most 4")
    dr7 = _DR7_ALWAYS_ONE | _DR7_GLOBAL_EXACT
    for slot, each in enumerate(breakpoints):
        if each.kind not in _DR7_KINDS or each.size not in _DR7_SIZES:
            raise BreakpointError(
                f"no {each}", "use execute, write or access, and size 1, 2, 4 or 8"
            )
        # SDM: an execution breakpoint has length 1.
        size = 1 if each.kind == "execute" else each.size
        registers[slot] = each.address
        dr7 |= 2 << slot * 2
        dr7 |= (_DR7_SIZES[size] << 2 | _DR7_KINDS[each.kind]) << 16 + slot * 4
    return dr7


def _require_size(what: str, state: bytes, size: int) -> None:
    if len(state) != size:
        raise StateSizeError(f"{len(state)} bytes for {what}", f"pass {size}")
