"""The boot disk: one image with the boot sector, the kernel, its start info and the initramfs."""

import struct
import subprocess
import tempfile
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.testbed.kernel_image import FlatKernel

__all__ = ["BootDiskError", "cpio", "write"]

_SECTOR = 512
_TABLE = 0x180  # in boot_sector.S
_CYLINDER = 16 * 63 * _SECTOR  # Bochs wants whole cylinders

# Guest-physical places. The kernel itself is at 16 MiB, where its ELF headers say.
_START_INFO = 0x80_0000
_INITRAMFS_ALIGNMENT = 0x100_0000

_PVH_MAGIC = 0x336EC578  # Linux include/xen/interface/hvm/start_info.h
_RAM, _RESERVED, _ACPI = 1, 2, 3

# Offsets in our page at _START_INFO.
_MODULES = 0x80
_MEMORY_MAP = 0x100
_COMMAND_LINE = 0x400
_START_INFO_SIZE = 0x1000


class BootDiskError(PykvmError):
    """The boot disk cannot be assembled."""


def write(path: Path, kernel: FlatKernel, initramfs: bytes, command_line: str, memory: int) -> None:
    """Write a boot disk for a machine with `memory` bytes of RAM.

    Raises:
        BootDiskError: the boot sector cannot be assembled, or the parts do not fit.
    """
    initramfs_at = -(-(kernel.address + kernel.memory) // _INITRAMFS_ALIGNMENT)
    initramfs_at *= _INITRAMFS_ALIGNMENT
    if initramfs_at + len(initramfs) > memory // 2:
        raise BootDiskError(f"kernel and initramfs do not fit into {memory >> 20} MiB of memory")
    info = _start_info(initramfs_at, len(initramfs), command_line, memory)
    images = ((kernel.address, kernel.data), (_START_INFO, info), (initramfs_at, initramfs))
    sector = _boot_sector()
    table = b""
    with path.open("wb") as disk:
        disk.seek(_SECTOR)
        for address, data in images:
            start = disk.tell() // _SECTOR
            sectors = -(-len(data) // _SECTOR)
            table += struct.pack("<III", address, start, sectors)
            disk.write(data.ljust(sectors * _SECTOR, b"\0"))
        table += struct.pack("<IIIII", 0, 0, 0, _START_INFO, kernel.entry)
        disk.truncate(-(-disk.tell() // _CYLINDER) * _CYLINDER)
        disk.seek(0)
        disk.write(sector[:_TABLE] + table + sector[_TABLE + len(table) :])


def cpio(files: list[tuple[str, bytes | None, int]]) -> bytes:
    """An initramfs archive ("newc") of `files`: path, content (None for a directory), mode bits.

    Shape: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    archive = bytearray()
    entries = [*files, ("TRAILER!!!", b"", 0)]
    for inode, (name, content, mode) in enumerate(entries, start=1):
        kind = 0o040000 if content is None else 0o100000
        data = content or b""
        fields = (inode, kind | mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += b"\0" * (-len(archive) % 4)
        archive += data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def _start_info(initramfs: int, size: int, command_line: str, memory: int) -> bytes:
    # The same map as the emulator's firmware gives, whose answer only a real-mode call could get.
    memory_map = (
        (0, 0x9F000, _RAM),
        (0x9F000, 0x61000, _RESERVED),
        (0x100000, memory - 0x100000 - 0x10000, _RAM),
        (memory - 0x10000, 0x10000, _ACPI),
        (0xFFFC0000, 0x40000, _RESERVED),
    )
    page = bytearray(_START_INFO_SIZE)
    struct.pack_into(
        "<IIIIQQQQII",
        page,
        0,
        _PVH_MAGIC,
        1,  # version: with a memory map
        0,
        1,  # modules
        _START_INFO + _MODULES,
        _START_INFO + _COMMAND_LINE,
        0,  # the kernel finds the ACPI tables by itself
        _START_INFO + _MEMORY_MAP,
        len(memory_map),
        0,
    )
    struct.pack_into("<QQQQ", page, _MODULES, initramfs, size, 0, 0)
    for index, (start, length, kind) in enumerate(memory_map):
        struct.pack_into("<QQII", page, _MEMORY_MAP + 24 * index, start, length, kind, 0)
    text = command_line.encode() + b"\0"
    if len(text) > _START_INFO_SIZE - _COMMAND_LINE:
        raise BootDiskError("the kernel command line is too long")
    page[_COMMAND_LINE : _COMMAND_LINE + len(text)] = text
    return bytes(page)


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
