"""Memory at guest virtual addresses, as a paused vCPU sees it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.paging_mode import paging_levels
from pykvm.kvm import KvmError, Struct, Vcpu
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import AddressError
from pykvm.paging.entries import X86Entry
from pykvm.paging.walk import walk
from pykvm.sizes import PAGE_SIZE

__all__ = ["AddressSpace", "NoMemoryError"]

_ADDRESSES: Final = 1 << 64


class NoMemoryError(PykvmError, ValueError):
    """A guest virtual address with no memory behind it."""


class AddressSpace:
    """Memory through the page tables that a vCPU's CR3 names.

    The host's accesses ignore the tables' permissions: a debugger reads what only the kernel may
    read, and writes breakpoints to code. Devices' registers are not memory: reading them could
    change them.
    """

    def __init__(self, vcpu: Vcpu, memory: GuestMemory) -> None:
        self._vcpu = vcpu
        self._memory = memory

    def physical(self, address: int) -> int | None:
        """Return the GPA of a virtual address, or None where nothing is mapped."""
        try:
            if self._levels < 4:
                found = self._vcpu.translate_gva(address)
                return None if found is None else found.physical
            # KVM_TRANSLATE asks as the kernel does: it refuses a user's pages where SMAP is on.
            return walk(self._cr3, address, X86Entry, self._table, levels=self._levels).target
        except (KvmError, AddressError):
            return None

    def _table(self, gpa: int) -> memoryview:
        return self._memory.view(gpa, PAGE_SIZE).cast("Q")

    @cached_property
    def _levels(self) -> int:
        return paging_levels(self._sregs)

    @cached_property
    def _cr3(self) -> int:
        return int(self._sregs.cr3)

    @cached_property
    def _sregs(self) -> Struct:
        return self._vcpu.get_sregs()

    def read(self, address: int, size: int) -> bytes:
        """Return bytes from `address` on, up to the first that is not mapped to memory."""
        parts = []
        for part, length in _pages(address, size):
            physical = self.physical(part)
            if physical is None:
                break
            try:
                parts.append(self._memory.read(physical, length))
            except AddressError:
                break
        return b"".join(parts)

    def memory_at(self, address: int, size: int = 1) -> tuple[int, memoryview]:
        """Return the GPA of a virtual address, and a view of `size` bytes there, inside its page.

        Raises:
            NoMemoryError: there is no memory.
        """
        physical = self.physical(address)
        if physical is None:
            raise NoMemoryError(
                f"the guest maps nothing at {address:#x}", "see the levels: monitor walk ADDRESS"
            )
        try:
            return physical, self._memory.view(physical, size)
        except AddressError as error:
            raise NoMemoryError(
                f"no memory at {address:#x} (GPA {physical:#x})", error.next_step
            ) from error

    def write(self, address: int, data: bytes) -> None:
        """Write bytes, or none of them.

        Raises:
            NoMemoryError: one has no memory behind it.
        """
        targets = []
        done = 0
        for part, length in _pages(address, len(data)):
            _, view = self.memory_at(part, length)
            targets.append((view, data[done : done + length]))
            done += length
        for view, part_of_data in targets:
            view[:] = part_of_data


def _pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range, page by page; none goes over the end of the address space."""
    end = min(address + size, _ADDRESSES)
    while address < end:
        length = min(end, address // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE) - address
        yield address, length
        address += length
