"""What is inside a vCPU: registers, events, CPUID, MSRs, time, debugging.

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
from typing import Any

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.cpuid import CpuidEntry, pack_cpuid, read_cpuid
from pykvm.kvm.device import Attributes
from pykvm.kvm.handle import Struct, capability_number
from pykvm.kvm.ioctls import Capability
from pykvm.kvm.msr import read_msrs, write_msrs

__all__ = ["Breakpoint", "MpState", "Translation", "VcpuState"]


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


class VcpuState(Attributes):
    """The part of `Vcpu` that reads and writes its state. Not while the vCPU runs."""

    # ---- registers --------------------------------------------------------------------------
    def get_regs(self) -> Struct:
        """struct kvm_regs: rax to r15, rip, rflags."""
        return self._get("KVM_GET_REGS", "kvm_regs")

    def set_regs(self, regs: Struct | None = None, **values: int) -> None:
        """Set all of struct kvm_regs, or the named registers: ``set_regs(rip=0x1000)``."""
        regs = self.get_regs() if regs is None else regs
        for name, value in values.items():
            setattr(regs, name, value)
        self.ioctl("KVM_SET_REGS", regs)

    def get_sregs(self) -> Struct:
        """struct kvm_sregs: segments, descriptor tables, control registers, EFER."""
        return self._get("KVM_GET_SREGS", "kvm_sregs")

    def set_sregs(self, sregs: Struct) -> None:
        """Set all of struct kvm_sregs; call `set_cpuid` first.

        Newer kernels refuse EFER.LME, LMA and NX of a vCPU whose CPUID lacks long mode or NX
        (Linux arch/x86/kvm, kvm_is_valid_sregs(): seen in 6.12.117, not in 6.1.192).
        """
        self.ioctl("KVM_SET_SREGS", sregs)

    def get_sregs2(self) -> Struct:
        """struct kvm_sregs2: as kvm_sregs, with PDPTRs and without the interrupt bitmap."""
        return self._get("KVM_GET_SREGS2", "kvm_sregs2")

    def set_sregs2(self, sregs: Struct) -> None:
        self.ioctl("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> Struct:
        """struct kvm_fpu: x87 and SSE."""
        return self._get("KVM_GET_FPU", "kvm_fpu")

    def set_fpu(self, fpu: Struct) -> None:
        self.ioctl("KVM_SET_FPU", fpu)

    def get_xsave(self) -> bytes:
        """The XSAVE area (SDM vol. 1, 13.4), 4096 bytes or as many as KVM_CAP_XSAVE2 says."""
        size = self.check_extension("KVM_CAP_XSAVE2")
        area = ffi.new("char[]", max(size, ffi.sizeof("struct kvm_xsave")))
        self.ioctl("KVM_GET_XSAVE2" if size else "KVM_GET_XSAVE", area)
        return ffi.buffer(area)[:]

    def set_xsave(self, area: bytes) -> None:
        """Write back what `get_xsave` gave."""
        self.ioctl("KVM_SET_XSAVE", ffi.from_buffer(area))

    def get_xcrs(self) -> dict[int, int]:
        """Extended control registers, number to value; XCR0 is 0."""
        xcrs = self._get("KVM_GET_XCRS", "kvm_xcrs")
        return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": len(values)})
        for slot, (number, value) in enumerate(values.items()):
            xcrs.xcrs[slot].xcr = number
            xcrs.xcrs[slot].value = value
        self.ioctl("KVM_SET_XCRS", xcrs)

    def get_debugregs(self) -> Struct:
        """struct kvm_debugregs: db[4], dr6, dr7."""
        return self._get("KVM_GET_DEBUGREGS", "kvm_debugregs")

    def set_debugregs(self, debugregs: Struct) -> None:
        self.ioctl("KVM_SET_DEBUGREGS", debugregs)

    # ---- events -----------------------------------------------------------------------------
    def get_events(self) -> Struct:
        """struct kvm_vcpu_events: pending and injected exceptions, interrupts, NMI, SMI."""
        return self._get("KVM_GET_VCPU_EVENTS", "kvm_vcpu_events")

    def set_events(self, events: Struct) -> None:
        """events.flags says which optional fields count: ``lib.KVM_VCPUEVENT_VALID_*``."""
        self.ioctl("KVM_SET_VCPU_EVENTS", events)

    def get_mp_state(self) -> MpState:
        return MpState(self._get("KVM_GET_MP_STATE", "kvm_mp_state").mp_state)

    def set_mp_state(self, state: MpState) -> None:
        self.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", {"mp_state": int(state)}))

    def get_lapic(self) -> bytes:
        """The local APIC's registers, 1024 bytes."""
        return ffi.buffer(self._get("KVM_GET_LAPIC", "kvm_lapic_state"))[:]

    def set_lapic(self, registers: bytes) -> None:
        state = ffi.new("struct kvm_lapic_state *")
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
        """Machine-check banks, out of `Kvm.mce_capabilities`."""
        self.ioctl("KVM_X86_SETUP_MCE", ffi.new("__u64 *", capabilities))

    # ---- CPUID, MSRs ------------------------------------------------------------------------
    def get_cpuid(self) -> list[CpuidEntry]:
        """What the guest's CPUID gives."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_CPUID2", table))

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """What the guest's CPUID gives; once, before the first run()."""
        self.ioctl("KVM_SET_CPUID2", pack_cpuid(entries))

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Number to value. Raises MsrError at the first that KVM does not read."""
        return read_msrs(lambda table: self.ioctl("KVM_GET_MSRS", table), indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set MSRs, in order. Raises MsrError at the first that KVM does not write."""
        write_msrs(lambda table: self.ioctl("KVM_SET_MSRS", table), values)

    def enable_cap(self, capability: str | int | Capability, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP on the vCPU with up to four arguments."""
        number = capability_number(capability)
        request: Any = ffi.new("struct kvm_enable_cap *", {"cap": number, "flags": flags})
        request.args = args
        self.ioctl("KVM_ENABLE_CAP", request)

    def get_nested_state(self) -> bytes:
        """State of the guest's own guests (struct kvm_nested_state), as many bytes as it has."""
        size = self.require("KVM_CAP_NESTED_STATE", "get_nested_state()")
        area = ffi.new("char[]", size)
        state = ffi.cast("struct kvm_nested_state *", area)
        state.size = size
        self.ioctl("KVM_GET_NESTED_STATE", state)
        return ffi.buffer(area, state.size)[:]

    def set_nested_state(self, state: bytes) -> None:
        self.ioctl("KVM_SET_NESTED_STATE", ffi.from_buffer(state))

    # ---- time -------------------------------------------------------------------------------
    def tsc_khz(self) -> int:
        """Frequency of the guest's TSC, kHz."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Needs a processor that scales the TSC, or a frequency close to the host's."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    def has_tsc_offset(self) -> bool:
        return self.has_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)

    def tsc_offset(self) -> int:
        """What is added to the host's (scaled) TSC, modulo 2**64."""
        raw = self.get_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, 8)
        return int(struct.unpack("<Q", raw)[0])

    def set_tsc_offset(self, offset: int) -> None:
        raw = struct.pack("<Q", offset % 2**64)
        self.set_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, raw)

    def kvmclock_paused(self) -> None:
        """Tell a guest that uses kvmclock that it was paused, so that no watchdog bites."""
        self.ioctl("KVM_KVMCLOCK_CTRL")

    # ---- debugging --------------------------------------------------------------------------
    def guest_debug(
        self,
        *,
        single_step: bool = False,
        breakpoints: Sequence[Breakpoint] = (),
        software_breakpoints: bool = False,
        block_interrupts: bool = False,
    ) -> None:
        """Make the guest leave with `Debug`; without arguments: stop debugging.

        breakpoints: at most four. software_breakpoints: INT3 instructions leave too.
        block_interrupts: none is injected while single-stepping. Raises ValueError,
        CapabilityMissingError, IoctlError.
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
        if request.control:
            request.control |= lib.KVM_GUESTDBG_ENABLE
        self.ioctl("KVM_SET_GUEST_DEBUG", request)

    def translate(self, address: int) -> Translation | None:
        """Walk the guest's page tables for a virtual address; None where nothing is mapped."""
        request = ffi.new("struct kvm_translation *", {"linear_address": address})
        self.ioctl("KVM_TRANSLATE", request)
        if not request.valid:
            return None
        return Translation(
            request.physical_address, bool(request.writeable), bool(request.usermode)
        )


def _debug_registers(registers: Any, breakpoints: Sequence[Breakpoint]) -> int:
    """Fill DR0 to DR3; return DR7."""
    if len(breakpoints) > 4:
        raise ValueError(f"{len(breakpoints)} breakpoints: the processor has 4")
    dr7 = _DR7_ALWAYS_ONE | _DR7_GLOBAL_EXACT
    for slot, each in enumerate(breakpoints):
        if each.kind not in _DR7_KINDS or each.size not in _DR7_SIZES:
            raise ValueError(f"{each}: use execute, write or access, and size 1, 2, 4 or 8")
        # SDM: an execution breakpoint has length 1.
        size = 1 if each.kind == "execute" else each.size
        registers[slot] = each.address
        dr7 |= 2 << slot * 2
        dr7 |= (_DR7_SIZES[size] << 2 | _DR7_KINDS[each.kind]) << 16 + slot * 4
    return dr7
