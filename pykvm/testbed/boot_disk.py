"""The boot disk: the boot sector, the kernel, its boot parameters and tables, and the initramfs."""

import struct
import subprocess
import tempfile
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.testbed.kernel_image import FlatKernel

__all__ = ["BootDiskError", "write"]

_SECTOR = 512
_TABLE = 0x180  # in boot_sector.S
_CYLINDER = 16 * 63 * _SECTOR  # Bochs wants whole cylinders

# Guest-physical places. The kernel itself is at 16 MiB, where its ELF headers say.
_BOOT_PARAMETERS = 0x80_0000
_PAGE_TABLES = 0x80_2000
_INITRAMFS_ALIGNMENT = 0x100_0000

# struct boot_params: Linux arch/x86/include/uapi/asm/bootparam.h, Documentation/arch/x86/boot.rst.
_E820_ENTRIES = 0x1E8
_BOOT_FLAG = 0x1FE
_HEADER = 0x202  # "HdrS", then the version of the boot protocol
_TYPE_OF_LOADER = 0x210
_LOAD_FLAGS = 0x211
_RAMDISK = 0x218  # address, size
_COMMAND_LINE = 0x228
_E820_TABLE = 0x2D0
_COMMAND_LINE_AT = 0x1000  # behind the structure
_COMMAND_LINE_SIZE = 2048

_RAM, _RESERVED, _ACPI = 1, 2, 3

_PAE, _LA57 = 1 << 5, 1 << 12  # in CR4
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80


class BootDiskError(PykvmError):
    """The boot disk cannot be assembled."""


def write(
    path: Path,
    kernel: FlatKernel,
    initramfs: bytes,
    command_line: str,
    memory: int,
    *,
    levels: int = 4,
) -> None:
    """Write a boot disk for a machine with `memory` bytes of RAM.

    The kernel uses page tables of as many `levels`, 4 or 5, if the processor has five.

    Raises:
        BootDiskError: the boot sector cannot be assembled, or the parts do not fit.
    """
    initramfs_at = -(-(kernel.address + kernel.memory) // _INITRAMFS_ALIGNMENT)
    initramfs_at *= _INITRAMFS_ALIGNMENT
    if initramfs_at + len(initramfs) > memory // 2:
        raise BootDiskError(f"kernel and initramfs do not fit into {memory >> 20} MiB of memory")
    parameters = _boot_parameters(initramfs_at, len(initramfs), command_line, memory)
    images = (
        (kernel.address, kernel.data),
        (_BOOT_PARAMETERS, parameters),
        (_PAGE_TABLES, _page_tables()),
        (initramfs_at, initramfs),
    )
    root = _PAGE_TABLES + (5 - levels) * 0x1000
    cr4 = _PAE | (_LA57 if levels == 5 else 0)
    sector = _boot_sector()
    table = b""
    with path.open("wb") as disk:
        disk.seek(_SECTOR)
        for address, data in images:
            start = disk.tell() // _SECTOR
            sectors = -(-len(data) // _SECTOR)
            table += struct.pack("<III", address, start, sectors)
            disk.write(data.ljust(sectors * _SECTOR, b"\0"))
        table += struct.pack("<III", 0, 0, 0)
        table += struct.pack("<IIII", _BOOT_PARAMETERS, kernel.entry, root, cr4)
        disk.truncate(-(-disk.tell() // _CYLINDER) * _CYLINDER)
        disk.seek(0)
        disk.write(sector[:_TABLE] + table + sector[_TABLE + len(table) :])


def _boot_parameters(initramfs: int, size: int, command_line: str, memory: int) -> bytes:
    # The same map as the emulator's firmware gives, whose answer only a real-mode call could get.
    memory_map = (
        (0, 0x9F000, _RAM),
        (0x9F000, 0x61000, _RESERVED),
        (0x100000, memory - 0x100000 - 0x10000, _RAM),
        (memory - 0x10000, 0x10000, _ACPI),
        (0xFFFC0000, 0x40000, _RESERVED),
    )
    page = bytearray(_COMMAND_LINE_AT)
    page[_E820_ENTRIES] = len(memory_map)
    for index, entry in enumerate(memory_map):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * index, *entry)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    struct.pack_into("<4sH", page, _HEADER, b"HdrS", 0x20F)
    page[_TYPE_OF_LOADER] = 0xFF  # none that has a number
    page[_LOAD_FLAGS] = 1  # loaded above 1 MiB
    struct.pack_into("<II", page, _RAMDISK, initramfs, size)
    struct.pack_into("<I", page, _COMMAND_LINE, _BOOT_PARAMETERS + _COMMAND_LINE_AT)
    text = command_line.encode() + b"\0"
    if len(text) > _COMMAND_LINE_SIZE:
        raise BootDiskError("the kernel command line is too long")
    return bytes(page) + text


def _page_tables() -> bytes:
    """Root of five levels, root of four, and a page of 1 GiB at its own address."""
    tables = bytearray(3 * 0x1000)
    for number in range(2):
        entry = _PAGE_TABLES + (number + 1) * 0x1000 | _PRESENT_WRITABLE
        struct.pack_into("<Q", tables, number * 0x1000, entry)
    struct.pack_into("<Q", tables, 0x2000, _PRESENT_WRITABLE | _LARGE)
    return bytes(tables)


def _boot_sector() -> bytes:
    source = Path(__file__).with_name("boot_sector.S")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        binary, linked = str(work / "sector"), str(work / "sector.o")
        flat = ["-Ttext", "0x7c00", "--oformat", "binary"]
        for command in (
            ["gcc", "-c", "-m32", "-o", linked, str(source)],
            ["ld", "-m", "elf_i386", *flat, "-o", binary, linked],
        ):
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", check=False
                )
            except FileNotFoundError as error:
                raise BootDiskError(
                    f"no program {error.filename}", install(["gcc", "binutils"])
                ) from error
            if result.returncode:
                raise BootDiskError(f"cannot assemble the boot sector ({result.stderr.strip()})")
        return (work / "sector").read_bytes()
