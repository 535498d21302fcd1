"""The Multiboot image of the tests: 64-bit code, in a 32-bit ELF file as kvm-unit-tests have it."""

from pathlib import Path

from pykvm.toolchain import compiler
from pykvm.toolchain.elf import ElfFile
from tests.rigs.kernel_files import elf32

_LINUX = Path(__file__).with_name("linux")


def image_64() -> Path:
    """Return the program multiboot.c as a 64-bit ELF file, compiled or from the cache."""
    sources = [_LINUX / "multiboot.S", _LINUX / "multiboot.c"]
    return compiler.build("bare-guest", sources, _LINUX / "multiboot.ld")


def image_32() -> bytes:
    """Return it as a 32-bit file."""
    elf = ElfFile.parse(image_64().read_bytes(), "multiboot")
    loads = [(one.address, one.data, one.size) for one in elf.segments]
    return elf32(loads, elf.entry)
