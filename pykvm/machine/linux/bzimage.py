"""A bzImage, booted by its 64-bit protocol: it unpacks itself in the guest.

Source: Linux Documentation/arch/x86/boot.rst, zero-page.rst.
"""

import os
import struct
from typing import Final

from pykvm.kvm import Vcpu
from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import BootInfo, KernelError, read_into
from pykvm.machine.x86 import flat
from pykvm.machine.x86.control_registers import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
)
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import AddressError
from pykvm.paging.entries import Access, X86Entry
from pykvm.paging.tables import PageTables, TableAddresses
from pykvm.sizes import GIB, MIB

__all__ = ["HEADER_SIZE", "BzImage", "is_bzimage"]

HEADER_SIZE: Final = 0x290
"""Bytes from the start of the file to the end of what struct boot_params has room for."""

_SIGNATURE: Final = 0x202
_VERSION: Final = 0x206
_SETUP_SECTORS: Final = 0x1F1
_HEADER_END: Final = 0x201  # a byte: the header ends so many bytes behind 0x202
_XLOADFLAGS: Final = 0x236
_COMMAND_LINE_SIZE: Final = 0x238
_PAYLOAD: Final = 0x248  # offset and length
_PREFERRED_ADDRESS: Final = 0x258
_INIT_SIZE: Final = 0x260
_XLF_KERNEL_64: Final = 1 << 0
_WITH_COMMAND_LINE_SIZE: Final = 0x20C  # the first version with all of these fields

# Offsets in struct boot_params.
_RSDP: Final = 0x070
_EXT_RAMDISK: Final = (0x0C0, 0x0C4)  # image, size: their upper halves
_EXT_COMMAND_LINE: Final = 0x0C8
_E820_COUNT: Final = 0x1E8
_TYPE_OF_LOADER: Final = 0x210
_RAMDISK: Final = (0x218, 0x21C)
_COMMAND_LINE: Final = 0x228
_E820: Final = 0x2D0
_PARAMS_SIZE: Final = 0x1000
_UNREGISTERED_LOADER: Final = 0xFF

_LOAD_GPA: Final = 1 * MIB
_ENTRY_64: Final = 0x200  # from the start of the protected-mode part


def is_bzimage(head: bytes) -> bool:
    """Return whether a file that begins with `head` has the header of Linux's boot protocol."""
    return head[_SIGNATURE : _SIGNATURE + 4] == b"HdrS"


class BzImage:
    """A bzImage in an open file.

    Attributes:
        end: physical address behind what it needs to unpack itself.
        longest_line: most bytes of its command line.

    Args:
        descriptor: the file; it stays the caller's.
        name: its name, for messages.

    Raises:
        KernelError: it is no bzImage, a too old or 32-bit one, or it is truncated.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._head = os.pread(descriptor, HEADER_SIZE, 0)
        if not is_bzimage(self._head) or len(self._head) < HEADER_SIZE:
            raise KernelError(f"{name} is no bzImage", "give a vmlinuz of Linux for x86-64")
        (version,) = struct.unpack_from("<H", self._head, _VERSION)
        (flags,) = struct.unpack_from("<H", self._head, _XLOADFLAGS)
        if version < _WITH_COMMAND_LINE_SIZE or not flags & _XLF_KERNEL_64:
            raise KernelError(f"{name} has no 64-bit entry point", "give a kernel for x86-64")
        (self.longest_line,) = struct.unpack_from("<I", self._head, _COMMAND_LINE_SIZE)
        (preferred,) = struct.unpack_from("<Q", self._head, _PREFERRED_ADDRESS)
        (init_size,) = struct.unpack_from("<I", self._head, _INIT_SIZE)
        self._start = (self._head[_SETUP_SECTORS] or 4) * 512 + 512
        self._size = os.fstat(descriptor).st_size - self._start
        offset, length = struct.unpack_from("<II", self._head, _PAYLOAD)
        if offset + length > self._size or self._size <= _ENTRY_64:
            raise KernelError(f"{name} is truncated", "copy it again")
        self.end = max(_LOAD_GPA + self._size, preferred) + init_size

    def payload(self) -> bytes:
        """Return the packed kernel inside."""
        offset, length = struct.unpack_from("<II", self._head, _PAYLOAD)
        return os.pread(self._descriptor, length, self._start + offset)

    def load(self, memory: GuestMemory) -> None:
        try:
            memory.view(_LOAD_GPA, self.end - _LOAD_GPA)
            view = memory.view(_LOAD_GPA, self._size)
        except AddressError as error:
            raise KernelError(
                f"{self._name} needs {self.end >> 20} MiB to unpack itself",
                f"give the guest {(self.end >> 20) + 64} MiB or more",
            ) from error
        read_into(self._descriptor, self._start, view, self._name)

    def start(self, vcpu: Vcpu, memory: GuestMemory, info: BootInfo) -> None:
        memory.write(layout.BOOT_PARAMS_GPA, self._params(info))
        memory.write(layout.BOOT_GDT_GPA, flat.boot_gdt(long=True))
        tables = PageTables(
            X86Entry, TableAddresses(layout.BOOT_TABLES_GPA, layout.BOOT_TABLES_SIZE)
        )
        access = Access.READ | Access.WRITE | Access.EXECUTE
        tables.map(0, 0, 4 * GIB, access, max_page=2 * MIB)
        tables.store(memory.write)
        sregs = vcpu.get_sregs()
        flat.set_flat_segments(sregs, layout.BOOT_GDT_GPA, long=True)
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG
        sregs.cr3, sregs.cr4 = tables.root, CR4_PAE
        sregs.efer = EFER_LME | EFER_LMA
        vcpu.set_sregs(sregs)
        vcpu.set_regs(rip=_LOAD_GPA + _ENTRY_64, rsi=layout.BOOT_PARAMS_GPA, rflags=2)

    def _params(self, info: BootInfo) -> bytes:
        """Return struct boot_params: the file's own header, and what the kernel is told."""
        params = bytearray(_PARAMS_SIZE)
        end = min(_SIGNATURE + self._head[_HEADER_END], HEADER_SIZE)
        params[_SETUP_SECTORS:end] = self._head[_SETUP_SECTORS:end]
        params[_TYPE_OF_LOADER] = _UNREGISTERED_LOADER

        def put(offset: int, upper: int, content: int) -> None:
            struct.pack_into("<I", params, offset, content & 0xFFFFFFFF)
            struct.pack_into("<I", params, upper, content >> 32)

        put(_COMMAND_LINE, _EXT_COMMAND_LINE, info.command_line)
        for offset, upper, content in zip(
            _RAMDISK, _EXT_RAMDISK, info.initrd or (0, 0), strict=True
        ):
            put(offset, upper, content)
        struct.pack_into("<Q", params, _RSDP, info.rsdp)
        params[_E820_COUNT] = len(info.ranges)
        for number, one in enumerate(info.ranges):
            struct.pack_into("<QQI", params, _E820 + 20 * number, one.gpa, one.size, one.kind)
        return bytes(params)
