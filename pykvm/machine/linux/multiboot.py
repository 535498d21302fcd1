"""A Multiboot image: a 32-bit ELF file, or any file whose header says where its parts go.

The flat images of kvm-unit-tests are of this kind: ELF32 files around 64-bit code, which the code
switches to by itself.

Source: Multiboot Specification 0.6.96: 3.1 (header), 3.2 (machine state), 3.3 (information).
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pykvm.kvm import Vcpu
from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import BootInfo, KernelError, MemoryKind, MemoryRange
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
from pykvm.sizes import KIB, PAGE_SIZE

__all__ = ["SEARCHED_SIZE", "MultibootImage", "information", "is_multiboot"]

SEARCHED_SIZE: Final = 8192
"""Bytes at the start of a file that hold the header."""

_MAGIC: Final = 0x1BADB002
_HEADER: Final = struct.Struct("<III")
_ADDRESSES: Final = struct.Struct("<IIIII")

# Flags of the header. Those of the lower half are what the image cannot do without.
_REQUIRED: Final = 0xFFFF
_ALIGNED_MODULES: Final = 1 << 0
_MEMORY_WANTED: Final = 1 << 1
_HAS_ADDRESSES: Final = 1 << 16

_ELF_HEADER: Final = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM: Final = struct.Struct("<8I")
_ELF32: Final = b"\x7fELF\x01\x01"
_ELF64: Final = b"\x7fELF\x02"
_EM_386: Final = 3
_PT_LOAD: Final = 1
_MOST_PROGRAMS: Final = 64

# What the image finds in EAX, and the information that EBX points to (3.3).
_LOADED: Final = 0x2BADB002
_INFO: Final = struct.Struct("<29I")
_INFO_MEMORY: Final = 1 << 0
_INFO_LINE: Final = 1 << 2
_INFO_MODULES: Final = 1 << 3
_INFO_MAP: Final = 1 << 6
_INFO_LOADER: Final = 1 << 9
_MODULE: Final = struct.Struct("<IIII")
_RANGE: Final = struct.Struct("<IQQI")
_LOADER: Final = b"pykvm\0"


@dataclass(frozen=True)
class _Header:
    """The header, and where it is in the file."""

    at: int
    flags: int


class MultibootImage:
    """A Multiboot image in an open file.

    Its command line begins with the file's name, as every boot loader has it.

    Attributes:
        entry: physical address of its first instruction.
        end: physical address behind its last byte, bss included.
        longest_line: most bytes of its command line.

    Args:
        descriptor: the file; it stays the caller's.
        name: its name, for messages.

    Raises:
        KernelError: it has no header, wants what this machine has not, is for another processor,
            or is truncated.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._word = os.fsencode(name) + b" "
        self.longest_line = layout.COMMAND_LINE_SIZE - 1 - len(self._word)
        head = os.pread(descriptor, SEARCHED_SIZE, 0)
        header = _find_header(head)
        if header is None:
            raise KernelError(f"{name} has no Multiboot header", "give another kernel")
        if more := header.flags & _REQUIRED & ~(_ALIGNED_MODULES | _MEMORY_WANTED):
            raise KernelError(
                f"{name} wants what this machine has not (Multiboot flags {more:#x})",
                "build it to do without a video mode",
            )
        if header.flags & _HAS_ADDRESSES:
            self.entry = self._by_addresses(head, header)
        else:
            self.entry = self._by_elf(head)
        require_whole(self._segments, descriptor, name)
        self.end = end_of(self._segments)
        require_entry(self.entry, self._segments, name)

    def _by_addresses(self, head: bytes, header: _Header) -> int:
        """Take the only segment from the header (3.1.3); return the entry point."""
        at = header.at + _HEADER.size
        if at + _ADDRESSES.size > len(head):
            raise KernelError(f"{self._name} is truncated", "copy it again")
        own, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(head, at)
        offset = header.at - (own - load)
        whole = os.fstat(self._descriptor).st_size - offset
        size = load_end - load if load_end else whole
        if not 0 <= offset <= header.at or size <= 0 or (bss_end and bss_end < load + size):
            raise KernelError(
                f"{self._name} has addresses in its Multiboot header that contradict each other",
                "link it again",
            )
        self._segments = [Segment(offset, load, size, bss_end - load if bss_end else size)]
        return int(entry)

    def _by_elf(self, head: bytes) -> int:
        """Take the segments from the ELF32 headers; return the entry point."""
        name = self._name
        if not head.startswith(_ELF32):
            raise KernelError(
                f"{name} has a Multiboot header, but is no ELF32 file",
                "make one of it: objcopy -O elf32-i386",
            )
        header = _ELF_HEADER.unpack(self._read(0, _ELF_HEADER.size))
        machine, entry, table, size, count = (header[at] for at in (2, 4, 5, 9, 10))
        if machine != _EM_386:
            raise KernelError(f"{name} is for machine {machine}, not for x86", "give another")
        if not 0 < count <= _MOST_PROGRAMS or size != _PROGRAM.size:
            raise KernelError(f"{name} has {count} segments", "give a whole file")
        loads = [
            one
            for one in _PROGRAM.iter_unpack(self._read(table, count * _PROGRAM.size))
            if one[0] == _PT_LOAD and one[5]
        ]
        if not loads:
            raise KernelError(f"{name} has nothing to load", "give a whole file")
        self._segments = [Segment(one[1], one[3], one[4], one[5]) for one in loads]
        for _, _, address, physical, _, length, _, _ in loads:
            if 0 <= entry - address < length:
                return int(entry - address + physical)
        return int(entry)

    def load(self, memory: GuestMemory) -> None:
        """Copy it into memory that is zero.

        Raises:
            KernelError: see `load_segments`.
        """
        load_segments(self._segments, self._descriptor, memory, self._name)

    def start(self, vcpu: Vcpu, memory: GuestMemory, info: BootInfo) -> None:
        """Put its name before the command line; write the information; set the vCPU's state."""
        line = memory.read(info.command_line, layout.COMMAND_LINE_SIZE - len(self._word))
        memory.write(info.command_line, self._word + line[: line.index(b"\0") + 1])
        memory.write(layout.START_INFO_GPA, information(layout.START_INFO_GPA, info))
        memory.write(layout.BOOT_GDT_GPA, flat.boot_gdt(long=False))
        flat.enter_protected_mode(
            vcpu, layout.BOOT_GDT_GPA, rip=self.entry, rax=_LOADED, rbx=layout.START_INFO_GPA
        )

    def _read(self, offset: int, size: int) -> bytes:
        return read_part(self._descriptor, offset, size, self._name)


def is_multiboot(head: bytes) -> bool:
    """Return whether a file can be loaded by a Multiboot header in its first `SEARCHED_SIZE` bytes.

    A 64-bit ELF file cannot, unless the header itself says where it goes.
    """
    header = _find_header(head)
    return header is not None and (
        bool(header.flags & _HAS_ADDRESSES) or not head.startswith(_ELF64)
    )


def _find_header(head: bytes) -> _Header | None:
    magic = _MAGIC.to_bytes(4, "little")
    at = head.find(magic)
    while 0 <= at <= min(len(head), SEARCHED_SIZE) - _HEADER.size:
        _, flags, checksum = _HEADER.unpack_from(head, at)
        if at % 4 == 0 and not (_MAGIC + flags + checksum) & 0xFFFF_FFFF:
            return _Header(at, flags)
        at = head.find(magic, at + 1)
    return None


def information(gpa: int, info: BootInfo) -> bytes:
    """Return the information with the lists that it points to, which begin at `gpa`.

    The initial RAM disks are one module, one behind the other.
    """
    modules_at = gpa + _INFO.size
    modules = b""
    if info.initrd:
        start, size = info.initrd
        modules = _MODULE.pack(start, start + size, 0, 0)
    ranges_at = modules_at + len(modules)
    ranges = b"".join(
        _RANGE.pack(_RANGE.size - 4, one.gpa, one.size, one.kind) for one in info.ranges
    )
    flags = _INFO_MEMORY | _INFO_LINE | _INFO_MAP | _INFO_LOADER
    head = _INFO.pack(
        flags | (_INFO_MODULES if modules else 0),
        _kibibytes(info.ranges, 0),
        _kibibytes(info.ranges, layout.FIRST_MEGABYTE),
        *(0, info.command_line),
        *(bool(modules), modules_at if modules else 0),
        *(0, 0, 0, 0),  # symbols
        *(len(ranges), ranges_at),
        *(0, 0, 0),  # drives, the BIOS's table
        ranges_at + len(ranges),
        *(0,) * 12,  # APM, video
    )
    data = head + modules + ranges + _LOADER
    assert len(data) <= PAGE_SIZE
    return data


def _kibibytes(ranges: Sequence[MemoryRange], gpa: int) -> int:
    """Return how much RAM begins at an address."""
    sizes = (one.size for one in ranges if one.gpa == gpa and one.kind is MemoryKind.RAM)
    return next(sizes, 0) // KIB
