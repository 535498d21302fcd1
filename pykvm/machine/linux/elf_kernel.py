"""A kernel as an ELF file (vmlinux): its segments, and where it is entered by the PVH protocol.

The file is not read as a whole: its segments go straight into the guest's memory.

Source: System V ABI, AMD64 supplement; Linux Documentation/arch/x86 (PVH); Xen public/elfnote.h.
"""

import struct
from typing import Final

from pykvm.kvm import Vcpu
from pykvm.machine.linux import layout, pvh
from pykvm.machine.linux.boot import BootInfo, KernelError
from pykvm.machine.linux.segments import (
    Segment,
    end_of,
    load_segments,
    read_part,
    require_entry,
    require_whole,
)
from pykvm.machine.x86 import flat
from pykvm.memory.guest_memory import GuestMemory

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
            point inside of it.
    """

    longest_line: Final = 2047

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        header = _HEADER.unpack(self._read(0, _HEADER.size))
        ident, _, machine, table, entries = header[0], header[1], header[2], header[5], header[10]
        if ident[:6] != b"\x7fELF\x02\x01":
            raise KernelError(f"{name} is no little-endian ELF64 file", "give a vmlinux")
        if machine != _EM_X86_64:
            raise KernelError(f"{name} is for machine {machine}, not for x86-64", "give another")
        if not 0 < entries <= _MOST_HEADERS or header[9] != _PROGRAM.size:
            raise KernelError(f"{name} has {entries} segments", "give a whole vmlinux")
        data = self._read(table, entries * _PROGRAM.size)
        headers = list(_PROGRAM.iter_unpack(data))
        self._loads = [
            Segment(one[2], one[4], one[5], one[6])
            for one in headers
            if one[0] == _PT_LOAD and one[6]
        ]
        if not self._loads:
            raise KernelError(f"{name} has nothing to load", "give a whole vmlinux")
        require_whole(self._loads, descriptor, name)
        self.end = end_of(self._loads)
        entry = self._find_pvh_entry([(one[2], one[5]) for one in headers if one[0] == _PT_NOTE])
        if entry is None:
            raise KernelError(
                f"{name} has no PVH entry point", "use a kernel built with CONFIG_PVH, or a bzImage"
            )
        require_entry(entry, self._loads, name)
        self.entry = entry

    def load(self, memory: GuestMemory) -> None:
        """Copy the segments into memory that is zero.

        Raises:
            KernelError: see `load_segments`.
        """
        load_segments(self._loads, self._descriptor, memory, self._name)

    def start(self, vcpu: Vcpu, memory: GuestMemory, info: BootInfo) -> None:
        memory.write(layout.START_INFO_GPA, pvh.start_info(layout.START_INFO_GPA, info))
        memory.write(layout.BOOT_GDT_GPA, flat.boot_gdt(long=False))
        pvh.enter(vcpu, self.entry, layout.START_INFO_GPA, layout.BOOT_GDT_GPA)

    def _read(self, offset: int, size: int) -> bytes:
        return read_part(self._descriptor, offset, size, self._name)

    def _find_pvh_entry(self, parts: list[tuple[int, int]]) -> int | None:
        for offset, length in parts:
            if length > _MOST_NOTES:
                continue
            notes, at = self._read(offset, length), 0
            while at + _NOTE.size <= len(notes):
                name_size, size, kind = _NOTE.unpack_from(notes, at)
                name_at = at + _NOTE.size
                data_at = name_at + -(-name_size // 4) * 4
                name = notes[name_at : name_at + name_size]
                if kind == _PVH_ENTRY and name == b"Xen\0" and 4 <= size <= 8:
                    return int.from_bytes(notes[data_at : data_at + size], "little")
                at = data_at + -(-size // 4) * 4
        return None
