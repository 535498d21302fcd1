"""The part of `Vm` that x86 alone has: PIC and IOAPIC, PIT, clocks, MSR and PMU filters.

Source: Documentation/virt/kvm/api.rst 4.24 to 4.30, 4.71, 4.97, 4.120, 7.5.
"""

from __future__ import annotations

from collections.abc import Sequence

from pykvm.kvm.device import Attributes
from pykvm.kvm.errors import StateSizeError
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.kvm.x86.msr import MsrRange, pack_msr_filter

__all__ = ["X86Vm"]


class X86Vm(Attributes):
    """Interrupt controllers, timers and filters of a VM on x86."""

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """Choose the vCPU that starts by itself, 0 by default. Before the first vCPU."""
        self.ioctl("KVM_SET_BOOT_CPU_ID", vcpu_id)

    def set_tss_address(self, gpa: int) -> None:
        """Reserve three pages below 4 GiB for Intel's real-mode emulation; no slot may use them."""
        self.ioctl("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_address(self, gpa: int) -> None:
        """Reserve one page below 4 GiB for real mode without "unrestricted guest"."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("__u64 *", gpa))

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limit the pages that KVM spends on shadow tables."""
        self.ioctl("KVM_SET_NR_MMU_PAGES", pages)

    # ---- irqchip ----------------------------------------------------------------------------
    def create_irqchip(self) -> None:
        """Make PIC, IOAPIC and a local APIC per vCPU in the kernel; before the first vCPU."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def enable_split_irqchip(self, ioapic_pins: int = 24) -> None:
        """Make local APICs in the kernel; PIC and IOAPIC are user space's (`IoapicEoi` exits)."""
        self.require("KVM_CAP_SPLIT_IRQCHIP", "enable_split_irqchip()")
        self.enable_cap("KVM_CAP_SPLIT_IRQCHIP", ioapic_pins)

    def get_irqchip(self, chip: int) -> bytes:
        """Return the state of one chip, 512 bytes (struct kvm_pic_state or kvm_ioapic_state)."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        self.ioctl("KVM_GET_IRQCHIP", state)
        return ffi.buffer(state.chip.dummy)[:]

    def set_irqchip(self, chip: int, state: bytes) -> None:
        """Write back what `get_irqchip` gave.

        Raises:
            StateSizeError: the length is not that of a chip.
        """
        request = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        area = ffi.buffer(request.chip.dummy)
        if len(state) != len(area):
            raise StateSizeError(f"{len(state)} bytes for a chip", f"pass {len(area)}")
        area[:] = state
        self.ioctl("KVM_SET_IRQCHIP", request)

    # ---- PIT and clocks ---------------------------------------------------------------------
    def create_pit2(self, *, speaker_dummy: bool = True) -> None:
        """Make an i8254 in the kernel, after `create_irqchip`.

        Args:
            speaker_dummy: whether port 0x61 is there as well.
        """
        flags = lib.KVM_PIT_SPEAKER_DUMMY if speaker_dummy else 0
        self.ioctl("KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": flags}))

    def get_pit2(self) -> Struct:
        """Return struct kvm_pit_state2."""
        return self._get("KVM_GET_PIT2", "kvm_pit_state2")

    def set_pit2(self, state: Struct) -> None:
        """Set all of struct kvm_pit_state2."""
        self.ioctl("KVM_SET_PIT2", state)

    def set_pit_reinject(self, reinject: bool) -> None:
        """Choose whether timer ticks that the guest missed are delivered late."""
        request = ffi.new("struct kvm_reinject_control *", {"pit_reinject": int(reinject)})
        self.ioctl("KVM_REINJECT_CONTROL", request)

    def get_clock(self) -> Struct:
        """Return struct kvm_clock_data: kvmclock in ns, flags ``lib.KVM_CLOCK_*``."""
        return self._get("KVM_GET_CLOCK", "kvm_clock_data")

    def set_clock(self, nanoseconds: int, *, realtime: int | None = None) -> None:
        """Set the guest's kvmclock.

        Args:
            nanoseconds: its value.
            realtime: when it had that value, in ns of CLOCK_REALTIME; the time since then is added.
                None stands for now.

        Raises:
            IoctlError: this KVM does not add it (EINVAL): KVM_CAP_ADJUST_CLOCK has not the flag
                KVM_CLOCK_REALTIME, which it has since Linux 5.16.
        """
        request = ffi.new("struct kvm_clock_data *", {"clock": nanoseconds})
        if realtime is not None:
            request.flags, request.realtime = lib.KVM_CLOCK_REALTIME, realtime
        self.ioctl("KVM_SET_CLOCK", request)

    def get_tsc_khz(self) -> int:
        """Return the frequency of the TSC that new vCPUs get, kHz."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the TSC that new vCPUs get."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    # ---- MSRs, PMU --------------------------------------------------------------------------
    def set_msr_filter(self, ranges: Sequence[MsrRange], *, default_allow: bool = True) -> None:
        """Choose which MSRs the guest may touch; the others become #GP, or exits to user space.

        Args:
            ranges: at most 16, see `MsrRange`; none of them, with `default_allow`, removes the
                filter.
            default_allow: whether the guest may touch MSRs outside the ranges.

        Raises:
            MsrFilterError: KVM cannot take such a filter.
        """
        request, bitmaps = pack_msr_filter(ranges, default_allow)
        self.ioctl("KVM_X86_SET_MSR_FILTER", request)
        del bitmaps  # the kernel has copied them

    def enable_user_msrs(
        self, *, invalid: bool = True, unknown: bool = True, filtered: bool = True
    ) -> None:
        """Let MSR accesses that KVM refuses leave as `Rdmsr` and `Wrmsr` exits."""
        self.require("KVM_CAP_X86_USER_SPACE_MSR", "enable_user_msrs()")
        mask = 0
        for wanted, bit in (
            (invalid, lib.KVM_MSR_EXIT_REASON_INVAL),
            (unknown, lib.KVM_MSR_EXIT_REASON_UNKNOWN),
            (filtered, lib.KVM_MSR_EXIT_REASON_FILTER),
        ):
            mask |= bit if wanted else 0
        self.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", mask)

    def set_pmu_event_filter(self, events: Sequence[int], *, allow: bool) -> None:
        """Choose which performance events the guest may count: only these, or all but these."""
        request = ffi.new(
            "struct kvm_pmu_event_filter *", {"nevents": len(events), "events": len(events)}
        )
        request.action = lib.KVM_PMU_EVENT_ALLOW if allow else lib.KVM_PMU_EVENT_DENY
        for slot, event in enumerate(events):
            request.events[slot] = event
        self.ioctl("KVM_SET_PMU_EVENT_FILTER", request)
