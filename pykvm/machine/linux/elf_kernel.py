"""A kernel as an ELF file (vmlinux): its segments, and where it is entered by the PVH protocol.

The file is not read as a whole: its segments go straight into the guest's memory.

Source: System V ABI, AMD64 supplement; Linux Documentation/arch/x86 (PVH); Xen public/elfnote.h.
"""

import os
import struct
from dataclasses import dataclass
from typing import Final

from pykvm.kvm import Vcpu
from pykvm.machine.linux import layout, pvh
from pykvm.machine.linux.boot import BootInfo, KernelError, read_into
from pykvm.machine.x86 import flat
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import AddressError

__all__ = ["ElfKernel"]

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_EM_X86_64: Final = 62
_PVH_ENTRY: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_MOST_HEADERS: Final = 64
_MOST_NOTES: Final = 1 << 20


@dataclass(frozen=True)
class _Segment:
    type: int
    offset: int
    physical: int
    file_size: int
    memory_size: int


class ElfKernel:
    """An ELF kernel in an open file.

    Attributes:
        entry: physical address of its entry point by the PVH protocol.
        end: physical address behind its last byte, bss included.
        longest_line: most bytes of its command line (Linux COMMAND_LINE_SIZE).

    Args:
        descriptor: the file; it stays the caller's.
        name: its name, for messages.

    Raises:
        KernelError: it is not an ELF file for x86-64, it is truncated, or it has no PVH entry
            point.
    """

    longest_line: Final = 2047

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._size = os.fstat(descriptor).st_size
        header = _HEADER.unpack(self._read(0, _HEADER.size))
        ident, _, machine, table, entries = header[0], header[1], header[2], header[5], header[10]
        if ident[:6] != b"\x7fELF\x02\x01":
            raise KernelError(f"{name} is no little-endian ELF64 file", "give a vmlinux")
        if machine != _EM_X86_64:
            raise KernelError(f"{name} is for machine {machine}, not for x86-64", "give another")
        if not 0 < entries <= _MOST_HEADERS or header[9] != _PROGRAM.size:
            raise KernelError(f"{name} has {entries} segments", "give a whole vmlinux")
        data = self._read(table, entries * _PROGRAM.size)
        segments = [
            _Segment(one[0], one[2], one[4], one[5], one[6]) for one in _PROGRAM.iter_unpack(data)
        ]
        self._loads = [one for one in segments if one.type == _PT_LOAD and one.memory_size]
        if not self._loads:
            raise KernelError(f"{name} has nothing to load", "give a whole vmlinux")
        for one in self._loads:
            if one.file_size > one.memory_size or one.offset + one.file_size > self._size:
                raise KernelError(f"{name} is truncated", "copy it again")
        self.end = max(one.physical + one.memory_size for one in self._loads)
        entry = self._find_pvh_entry(segments)
        if entry is None:
            raise KernelError(
                f"{name} has no PVH entry point", "use a kernel built with CONFIG_PVH, or a bzImage"
            )
        self.entry = entry

    def load(self, memory: GuestMemory) -> None:
        """Copy the segments into memory that is zero.

        Raises:
            KernelError: there is no memory for one of them, or the file has become shorter.
        """
        for one in self._loads:
            try:
                memory.view(one.physical, one.memory_size)
                view = memory.view(one.physical, one.file_size)
            except AddressError as error:
                raise KernelError(
                    f"{self._name} needs memory at {one.physical:#x} to "
                    f"{one.physical + one.memory_size:#x}, which the guest has not",
                    f"give the guest {(self.end >> 20) + 64} MiB or more",
                ) from error
            read_into(self._descriptor, one.offset, view, self._name)

    def start(self, vcpu: Vcpu, memory: GuestMemory, info: BootInfo) -> None:
        memory.write(layout.START_INFO_GPA, pvh.start_info(layout.START_INFO_GPA, info))
        memory.write(layout.BOOT_GDT_GPA, flat.boot_gdt(long=False))
        pvh.enter(vcpu, self.entry, layout.START_INFO_GPA, layout.BOOT_GDT_GPA)

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset) if offset < self._size else b""
        if len(data) < size:
            raise KernelError(f"{self._name} is truncated", "copy it again")
        return data

    def _find_pvh_entry(self, segments: list[_Segment]) -> int | None:
        for one in segments:
            if one.type != _PT_NOTE or one.file_size > _MOST_NOTES:
                continue
            notes, at = self._read(one.offset, one.file_size), 0
            while at + _NOTE.size <= len(notes):
                name_size, size, kind = _NOTE.unpack_from(notes, at)
                name_at = at + _NOTE.size
                data_at = name_at + -(-name_size // 4) * 4
                name = notes[name_at : name_at + name_size]
                if kind == _PVH_ENTRY and name == b"Xen\0" and 4 <= size <= 8:
                    return int.from_bytes(notes[data_at : data_at + size], "little")
                at = data_at + -(-size // 4) * 4
        return None
