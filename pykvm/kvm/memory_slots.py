"""Memory slots of a VM: what guest physical memory is, dirty logs, coalesced writes.

Source: Documentation/virt/kvm/api.rst 4.8, 4.35, 4.116, 4.117.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pykvm.kvm.errors import DirtyLogError, IoctlError, MemorySlotError, MemorySlotOverlapError
from pykvm.kvm.handle import Handle
from pykvm.kvm.native import Struct, ffi, lib
from pykvm.sizes import PAGE_SIZE

__all__ = ["MemorySlot", "MemorySlots"]

_MOST_PAGES = (1 << 31) - 1
"""Pages of one slot: KVM_MEM_MAX_NR_PAGES in Linux virt/kvm/kvm_main.c."""


class MemorySlot(Protocol):
    """Sizes and addresses of a slot, in bytes; `pykvm.memory` has a class for it."""

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


class MemorySlots(Handle):
    """The part of `Vm` that gives the guest memory.

    The memory behind a slot belongs to the caller, who keeps it mapped while the VM runs.
    """

    def __init__(self, fd: int, parent: Handle) -> None:
        super().__init__(fd, parent)
        self._slots: dict[int, _Slot] = {}

    # ---- slots ------------------------------------------------------------------------------
    def set_memory_slot(self, slot: MemorySlot, *, log_dirty: bool = False) -> None:
        """As `set_user_memory_region`, from one object."""
        self.set_user_memory_region(
            slot.number,
            slot.gpa,
            slot.size,
            slot.host_address,
            read_only=slot.read_only,
            log_dirty=log_dirty,
        )

    def set_user_memory_region(
        self,
        number: int,
        gpa: int,
        size: int,
        host_address: int,
        *,
        read_only: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Give the guest memory, or move or re-flag a slot that it has.

        Args:
            number: the slot's number, below KVM_CAP_NR_MEMSLOTS.
            gpa: guest physical address; a multiple of 4096, like `size` and `host_address`.
            size: bytes.
            host_address: address of the memory in this process.
            read_only: whether the guest may only read.
            log_dirty: whether `get_dirty_log` works.

        Raises:
            MemorySlotError: KVM cannot make such a slot; the error says why.
            MemorySlotOverlapError: another slot has some of the addresses.
            CapabilityMissingError: this KVM has no read-only slots.
        """
        what = f"memory slot {number} ({size:#x} bytes at {gpa:#x})"
        for name, value in (("gpa", gpa), ("size", size), ("host address", host_address)):
            if value % PAGE_SIZE or value < 0:
                raise MemorySlotError(
                    f"{what}: {name} {value:#x} is not aligned",
                    f"use multiples of {PAGE_SIZE:#x}",
                    errno=errno.EINVAL,
                )
        if size == 0:
            raise MemorySlotError(
                f"{what} is empty", f"use delete_memory_slot({number})", errno=errno.EINVAL
            )
        if read_only:
            self.require("KVM_CAP_READONLY_MEM", "a read-only memory slot")
        wanted = _Slot(gpa, size, host_address, read_only)
        flags = (lib.KVM_MEM_READONLY if read_only else 0) | (
            lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        )
        try:
            self._set_region(number, wanted, size, flags)
        except OverflowError as error:
            raise MemorySlotError(f"{what}: numbers too large", "use 64-bit addresses") from error
        except IoctlError as error:
            if error.errno == errno.EEXIST:
                raise MemorySlotOverlapError(
                    f"{what} overlaps another slot", "choose another gpa", errno=errno.EEXIST
                ) from error
            if error.errno == errno.EINVAL:
                raise MemorySlotError(
                    f"kvm refuses {what}", self._why_refused(number, wanted), errno=errno.EINVAL
                ) from error
            raise
        self._slots[number] = wanted

    def delete_memory_slot(self, number: int) -> None:
        """Take a slot away.

        Raises:
            MemorySlotError: there is no such slot.
        """
        self._set_region(number, self._slot(number), 0, 0)
        del self._slots[number]

    def _set_region(self, number: int, slot: _Slot, size: int, flags: int) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = number
        region.flags = flags
        region.guest_phys_addr = slot.gpa
        region.memory_size = size
        region.userspace_addr = slot.host_address
        self.ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def _why_refused(self, number: int, wanted: _Slot) -> str:
        """Return what to change after EINVAL, which the kernel returns for several causes."""
        limit = self.check_extension("KVM_CAP_NR_MEMSLOTS")
        if number >= limit:
            return f"use slots below {limit}"
        old = self._slots.get(number)
        if old is not None:
            for name in ("size", "host_address", "read_only"):
                if getattr(old, name) != getattr(wanted, name):
                    what = name.replace("_", " ")
                    return f"call delete_memory_slot({number}) before changing its {what}"
        if wanted.size > _MOST_PAGES * PAGE_SIZE:
            return f"use several slots of at most {_MOST_PAGES * PAGE_SIZE:#x} bytes"
        return "use a gpa that the host's page tables reach, and memory of this process"

    def _slot(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            raise MemorySlotError(
                f"no memory slot {number}", f"use one of {sorted(self._slots)}", errno=errno.EINVAL
            )
        return slot

    def read_physical(self, gpa: int, size: int) -> bytes:
        """Return `size` bytes of guest memory, as far as one slot holds them.

        For reports: `pykvm.memory` is the way to work with guest memory.
        """
        for slot in self._slots.values():
            if slot.gpa <= gpa < slot.gpa + slot.size:
                size = min(size, slot.gpa + slot.size - gpa)
                start = ffi.cast("char *", slot.host_address + gpa - slot.gpa)
                return ffi.buffer(start, size)[:]
        return b""

    # ---- dirty logs -------------------------------------------------------------------------
    def enable_manual_dirty_log(self) -> None:
        """Let `get_dirty_log` leave pages dirty until `clear_dirty_log`."""
        available = self.require("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "enable_manual_dirty_log()")
        # Bit 0: the mode itself. Others are options that change what a new slot starts with.
        self.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", available & 1)

    def get_dirty_log(self, number: int) -> list[int]:
        """Return the numbers of pages within a slot that were written since the last call.

        In the manual mode pages stay dirty until cleared.

        Raises:
            MemorySlotError: there is no such slot.
            IoctlError: the slot does not log dirty pages (ENOENT).
        """
        words = self._bitmap(number)
        request = ffi.new("struct kvm_dirty_log *", {"slot": number})
        request.dirty_bitmap = words
        self.ioctl("KVM_GET_DIRTY_LOG", request)
        return list(_set_bits(words))

    def clear_dirty_log(self, number: int, dirty: Iterable[int]) -> None:
        """Make pages clean again, so that the next write is logged (manual mode).

        Raises:
            MemorySlotError: there is no such slot.
            DirtyLogError: the slot does not have such a page.
        """
        pages = self._slot(number).size // PAGE_SIZE
        words = self._bitmap(number)
        for page in dirty:
            if not 0 <= page < pages:
                raise DirtyLogError(
                    f"memory slot {number} has no page {page}", f"use 0 to {pages - 1}"
                )
            words[page // 64] |= 1 << page % 64
        request = ffi.new("struct kvm_clear_dirty_log *", {"slot": number, "num_pages": pages})
        request.dirty_bitmap = words
        self.ioctl("KVM_CLEAR_DIRTY_LOG", request)

    def _bitmap(self, number: int) -> Struct:
        """An empty bitmap of a slot's pages, as long as the kernel takes it: whole words."""
        pages = self._slot(number).size // PAGE_SIZE
        return ffi.new("__u64[]", (pages + 63) // 64)

    # ---- coalesced writes -------------------------------------------------------------------
    def register_coalesced_mmio(self, address: int, size: int, *, port: bool = False) -> None:
        """Queue writes to MMIO (or ports) until the next exit: see `Vcpu.coalesced_writes`."""
        self.ioctl("KVM_REGISTER_COALESCED_MMIO", self._zone(address, size, port))

    def unregister_coalesced_mmio(self, address: int, size: int, *, port: bool = False) -> None:
        """Undo `register_coalesced_mmio`."""
        self.ioctl("KVM_UNREGISTER_COALESCED_MMIO", self._zone(address, size, port))

    def _zone(self, address: int, size: int, port: bool) -> Struct:
        if port:
            self.require("KVM_CAP_COALESCED_PIO", "coalescing of port writes")
        zone = ffi.new("struct kvm_coalesced_mmio_zone *", {"addr": address, "size": size})
        zone.pio = int(port)
        return zone


def _set_bits(words: Struct) -> Iterator[int]:
    for index, word in enumerate(words):
        if word:
            yield from (index * 64 + bit for bit in range(64) if word >> bit & 1)
