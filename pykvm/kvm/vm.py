"""`Vm`: the handle on one virtual machine, and its memory slots.

Source: Documentation/virt/kvm/api.rst, "Type: vm ioctl".
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.device import Attributes, Device
from pykvm.kvm.errors import IoctlError, MemorySlotError, MemorySlotOverlapError
from pykvm.kvm.handle import Handle, capability_number
from pykvm.kvm.ioctls import IOCTLS, Capability, Scope
from pykvm.kvm.irq import VmInterrupts
from pykvm.kvm.msr import MsrRange, pack_msr_filter
from pykvm.kvm.stats import Stats
from pykvm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from pykvm.kvm.system import Kvm

__all__ = ["MemorySlot", "Vm"]

PAGE_SIZE = 4096

_Child = TypeVar("_Child", bound=Handle)


class MemorySlot(Protocol):
    """What `Vm.set_memory` wants to know, in bytes; `pykvm.memory` has a class for it."""

    @property
    def number(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def host_address(self) -> int: ...
    @property
    def read_only(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Slot:
    gpa: int
    size: int
    host_address: int
    read_only: bool


class Vm(VmInterrupts, Attributes):
    """A virtual machine. close() also closes the vCPUs, devices and contexts made from it.

    The memory behind a slot belongs to the caller, who keeps it mapped while the VM runs.
    """

    scope: ClassVar[Scope] = Scope.VM

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self.kvm = kvm
        self._vcpu_mmap_size = kvm.vcpu_mmap_size()
        self._extensions: dict[int, int] = {}
        self._slots: dict[int, _Slot] = {}
        self._children: weakref.WeakSet[Handle] = weakref.WeakSet()

    def adopt(self, child: _Child) -> _Child:
        """Close `child` together with this VM; returns it."""
        self._children.add(child)
        return child

    def close(self) -> None:
        for child in list(self._children):
            child.close()
        super().close()

    def check_extension(self, capability: str | int | Capability) -> int:
        """As `Kvm.check_extension`, for this VM: some capabilities depend on its type."""
        number = capability_number(capability)
        if number not in self._extensions:
            self._extensions[number] = max(
                self._raw_ioctl(IOCTLS["KVM_CHECK_EXTENSION"], number), 0
            )
        return self._extensions[number]

    def enable_cap(self, capability: str | int | Capability, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP with up to four arguments; api.rst chapter 7 says which."""
        number = capability_number(capability)
        request = ffi.new("struct kvm_enable_cap *", {"cap": number, "flags": flags})
        request.args = args
        self.ioctl("KVM_ENABLE_CAP", request)
        self._extensions.clear()  # enabling one can change what others say

    # ---- children ---------------------------------------------------------------------------
    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """A vCPU; vcpu_id is its APIC id, below KVM_CAP_MAX_VCPU_ID."""
        fd = self.ioctl("KVM_CREATE_VCPU", vcpu_id)
        return self.adopt(Vcpu(self, fd, vcpu_id, self._vcpu_mmap_size))

    def set_boot_cpu(self, vcpu_id: int) -> None:
        """Which vCPU starts by itself; 0 by default. Before the first vCPU."""
        self.ioctl("KVM_SET_BOOT_CPU_ID", vcpu_id)

    def create_device(self, device_type: int) -> Device:
        """A device in the kernel; device_type: ``lib.KVM_DEV_TYPE_*``."""
        request = ffi.new("struct kvm_create_device *", {"type": device_type})
        self.ioctl("KVM_CREATE_DEVICE", request)
        return self.adopt(Device(self, request.fd, device_type))

    def has_device(self, device_type: int) -> bool:
        """Whether `create_device` would make one; makes none."""
        request = ffi.new("struct kvm_create_device *", {"type": device_type})
        request.flags = lib.KVM_CREATE_DEVICE_TEST
        return self._raw_ioctl(IOCTLS["KVM_CREATE_DEVICE"], request) == 0

    def stats(self) -> Stats:
        """KVM's counters of this VM. The caller closes them; close() of the VM does too."""
        return self.adopt(Stats(self.ioctl("KVM_GET_STATS_FD")))

    # ---- memory -----------------------------------------------------------------------------
    def set_memory(self, slot: MemorySlot, *, log_dirty: bool = False) -> None:
        """Give the guest memory, or move or re-flag a slot that it has.

        Raises MemorySlotError, MemorySlotOverlapError, CapabilityMissingError (read-only).
        """
        self.set_memory_region(
            slot.number,
            slot.gpa,
            slot.size,
            slot.host_address,
            read_only=slot.read_only,
            log_dirty=log_dirty,
        )

    def set_memory_region(
        self,
        number: int,
        gpa: int,
        size: int,
        host_address: int,
        *,
        read_only: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """As `set_memory`, from numbers: bytes and addresses, multiples of 4096."""
        what = f"memory slot {number} ({size:#x} bytes at {gpa:#x})"
        for name, value in (("gpa", gpa), ("size", size), ("host address", host_address)):
            if value % PAGE_SIZE or value < 0:
                raise MemorySlotError(
                    f"{what}: {name} {value:#x} is not aligned: use multiples of {PAGE_SIZE:#x}",
                    errno.EINVAL,
                )
        if size == 0:
            raise MemorySlotError(f"{what} is empty: use delete_memory({number})", errno.EINVAL)
        if read_only:
            self.require("KVM_CAP_READONLY_MEM", "a read-only memory slot")
        flags = (lib.KVM_MEM_READONLY if read_only else 0) | (
            lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        )
        self._set_region(what, number, gpa=gpa, size=size, host_address=host_address, flags=flags)
        self._slots[number] = _Slot(gpa, size, host_address, read_only)

    def delete_memory(self, number: int) -> None:
        """Take a slot away. Raises MemorySlotError where there is none."""
        slot = self._slots.get(number)
        if slot is None:
            raise MemorySlotError(
                f"no memory slot {number}: use one of {sorted(self._slots)}", errno.EINVAL
            )
        self._set_region(
            f"memory slot {number}", number, gpa=slot.gpa, size=0, host_address=slot.host_address
        )
        del self._slots[number]

    def _set_region(
        self, what: str, number: int, *, gpa: int, size: int, host_address: int, flags: int = 0
    ) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *")
        try:
            region.slot = number
            region.guest_phys_addr = gpa
            region.memory_size = size
            region.userspace_addr = host_address
        except OverflowError as error:
            raise MemorySlotError(f"{what}: numbers too large: use 64-bit addresses") from error
        region.flags = flags
        try:
            self.ioctl("KVM_SET_USER_MEMORY_REGION", region)
        except IoctlError as error:
            if error.errno == errno.EEXIST:
                raise MemorySlotOverlapError(
                    f"{what} overlaps another slot: choose another gpa", errno.EEXIST
                ) from error
            if error.errno == errno.EINVAL:
                limit = self.check_extension("KVM_CAP_NR_MEMSLOTS")
                raise MemorySlotError(
                    f"kvm refuses {what}: use slots below {limit}, "
                    "and delete_memory() before changing size, place or read_only of a slot",
                    errno.EINVAL,
                ) from error
            raise

    def read_physical(self, gpa: int, size: int) -> bytes:
        """`size` bytes of guest memory, as far as one slot holds them; empty where none does.

        For reports: `pykvm.memory` is the way to work with guest memory.
        """
        for slot in self._slots.values():
            if slot.gpa <= gpa < slot.gpa + slot.size:
                size = min(size, slot.gpa + slot.size - gpa)
                start = ffi.cast("char *", slot.host_address + gpa - slot.gpa)
                return ffi.buffer(start, size)[:]
        return b""

    def enable_manual_dirty_log(self) -> None:
        """Let `dirty_log` leave pages dirty until `clear_dirty_log`."""
        available = self.require("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "enable_manual_dirty_log()")
        # Bit 0: the mode itself. Others are options that change what a new slot starts with.
        self.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", available & 1)

    def dirty_log(self, number: int) -> list[int]:
        """Page numbers within a slot, written since the last call; the slot logs dirty pages.

        In the manual mode pages stay dirty until cleared.
        """
        pages = self._pages(number)
        words = ffi.new("__u64[]", (pages + 63) // 64)
        request = ffi.new("struct kvm_dirty_log *", {"slot": number})
        request.dirty_bitmap = words
        self.ioctl("KVM_GET_DIRTY_LOG", request)
        return [page for page in range(pages) if words[page // 64] >> page % 64 & 1]

    def clear_dirty_log(self, number: int, dirty: Iterable[int]) -> None:
        """Make pages clean again, so that the next write is logged (manual mode)."""
        pages = self._pages(number)
        words = ffi.new("__u64[]", (pages + 63) // 64)
        for page in dirty:
            words[page // 64] |= 1 << page % 64
        request = ffi.new("struct kvm_clear_dirty_log *", {"slot": number, "num_pages": pages})
        request.dirty_bitmap = words
        self.ioctl("KVM_CLEAR_DIRTY_LOG", request)

    def dirty_ring_bytes(self) -> int:
        """Largest dirty ring per vCPU, in bytes; 0 where KVM has none."""
        return self.check_extension("KVM_CAP_DIRTY_LOG_RING")

    def _pages(self, number: int) -> int:
        slot = self._slots.get(number)
        if slot is None:
            raise MemorySlotError(
                f"no memory slot {number}: use one of {sorted(self._slots)}", errno.EINVAL
            )
        return slot.size // PAGE_SIZE

    def set_mmu_pages(self, pages: int) -> None:
        """Limit the pages that KVM spends on shadow tables."""
        self.ioctl("KVM_SET_NR_MMU_PAGES", pages)

    def set_tss_address(self, gpa: int) -> None:
        """Three pages below 4 GiB that Intel's real-mode emulation needs; no slot may use them."""
        self.ioctl("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_address(self, gpa: int) -> None:
        """One page below 4 GiB for real mode without "unrestricted guest"."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("__u64 *", gpa))

    def coalesce(self, address: int, size: int, *, port: bool = False) -> None:
        """Queue writes to MMIO (or ports) until the next exit: see `Vcpu.coalesced_writes`."""
        self.ioctl("KVM_REGISTER_COALESCED_MMIO", self._zone(address, size, port))

    def uncoalesce(self, address: int, size: int, *, port: bool = False) -> None:
        self.ioctl("KVM_UNREGISTER_COALESCED_MMIO", self._zone(address, size, port))

    def _zone(self, address: int, size: int, port: bool) -> object:
        if port:
            self.require("KVM_CAP_COALESCED_PIO", "coalescing of port writes")
        zone = ffi.new("struct kvm_coalesced_mmio_zone *", {"addr": address, "size": size})
        zone.pio = int(port)
        return zone

    # ---- MSRs, PMU --------------------------------------------------------------------------
    def set_msr_filter(self, ranges: Sequence[MsrRange], *, default_allow: bool = True) -> None:
        """Which MSRs the guest may touch; the others become #GP, or exits to user space.

        ranges: at most 16, see `MsrRange`; none and default_allow=True removes the filter.
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
        """Which performance events the guest may count: only these, or all but these."""
        request = ffi.new(
            "struct kvm_pmu_event_filter *", {"nevents": len(events), "events": len(events)}
        )
        request.action = lib.KVM_PMU_EVENT_ALLOW if allow else lib.KVM_PMU_EVENT_DENY
        for slot, event in enumerate(events):
            request.events[slot] = event
        self.ioctl("KVM_SET_PMU_EVENT_FILTER", request)
