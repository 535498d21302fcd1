"""Multiboot images: which files are, where their parts go, what they are told."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import BootInfo, KernelError, MemoryKind, MemoryRange
from pykvm.machine.linux.elf_kernel import ElfKernel
from pykvm.machine.linux.kernel_file import KernelFile
from pykvm.machine.linux.multiboot import MultibootImage, information
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.kernel_files import elf, elf32, multiboot_header
from tests.rigs.messages import one_line
from tests.rigs.multiboot_image import image_32, image_64

pytestmark = pytest.mark.unit

HEADER = multiboot_header()
ADDRESSES = 1 << 16


def written(directory: Path, content: bytes) -> Path:
    path = directory / "image"
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(KernelError) as caught:
        KernelFile(path)
    return one_line(caught.value)


def loaded(path: Path, memory: GuestMemory) -> MultibootImage:
    with KernelFile(path) as file:
        kernel = file.kernel
        assert isinstance(kernel, MultibootImage)
        kernel.load(memory)
        return kernel


def test_an_elf_file(tmp_path: Path) -> None:
    data = elf32([(4 * MIB, b"first", 4096), (5 * MIB, b"second", 8192)], 4 * MIB + 1, head=HEADER)
    with GuestMemory.create(16 * MIB) as memory:
        kernel = loaded(written(tmp_path, data), memory)
        assert (kernel.entry, kernel.end) == (4 * MIB + 1, 5 * MIB + 8192)
        assert memory.read(4 * MIB, 6) == b"first\0"
        assert memory.read(5 * MIB, 7) == b"second\0"


def test_an_entry_point_is_a_virtual_address(tmp_path: Path) -> None:
    data = elf32([(4 * MIB, b"code", 4096)], 0xC040_0002, head=HEADER, virtual=0xC000_0000)
    with KernelFile(written(tmp_path, data)) as file:
        assert isinstance(file.kernel, MultibootImage)
        assert file.kernel.entry == 4 * MIB + 2


@pytest.mark.parametrize("start", [b"", b"\x7fELF\x02\x01"])
def test_addresses_in_the_header(tmp_path: Path, start: bytes) -> None:
    """A file without a format, or of another one, is loaded as its header says."""
    place = 2 * MIB
    before = start.ljust(64, b"\x90")
    header = multiboot_header(ADDRESSES, place + 64, place + 16, place + 104, 3 * MIB, place + 98)
    data = before + header + b"code" + bytes(100)
    with GuestMemory.create(16 * MIB) as memory:
        kernel = loaded(written(tmp_path, data), memory)
        assert (kernel.entry, kernel.end) == (place + 98, 3 * MIB)
        assert memory.read(place, 17) == bytes(16) + b"\x90"
        assert memory.read(place + 96, 9) == b"code" + bytes(5)
        assert memory.read(place + 64, 32) == header


def test_addresses_up_to_the_end_of_the_file(tmp_path: Path) -> None:
    header = multiboot_header(ADDRESSES, 2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 32)
    with GuestMemory.create(16 * MIB) as memory:
        kernel = loaded(written(tmp_path, header + b"rest"), memory)
        assert kernel.end == 2 * MIB + 36
        assert memory.read(2 * MIB + 32, 5) == b"rest\0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (elf32([], 0, head=HEADER), "0 segments"),
        (elf32([(4 * MIB, b"", 0)], 0, head=HEADER), "nothing to load"),
        (elf32([(4 * MIB, b"xyz", 2)], 4 * MIB, head=HEADER), "truncated"),
        (elf32([(4 * MIB, b"x", 2)], 5 * MIB, head=HEADER), "begins at 0x500000, where nothing"),
        (elf32([(4 * MIB, b"x", 2)], 4 * MIB, head=HEADER, machine=40), "for machine 40"),
        (
            elf32([(4 * MIB, b"x", 2)], 4 * MIB, head=multiboot_header(4)),
            "wants what this machine has not (Multiboot flags 0x4)",
        ),
        (HEADER + b"code", "is no ELF32 file: make one of it: objcopy -O elf32-i386"),
        (multiboot_header(ADDRESSES), "truncated"),
        (multiboot_header(ADDRESSES, 2 * MIB, 3 * MIB, 0, 0, 2 * MIB), "contradict each other"),
        (multiboot_header(ADDRESSES, 2 * MIB, 1 * MIB, 0, 0, 2 * MIB), "contradict each other"),
        (
            multiboot_header(ADDRESSES, 2 * MIB, 2 * MIB, 1 * MIB, 0, 2 * MIB),
            "contradict each other",
        ),
        (
            multiboot_header(ADDRESSES, 2 * MIB, 2 * MIB, 2 * MIB + 4, 2 * MIB + 3, 2 * MIB),
            "contradict each other",
        ),
        (multiboot_header(ADDRESSES, 2 * MIB, 2 * MIB, 3 * MIB, 0, 2 * MIB), "truncated"),
        # No header: a wrong sum, an odd place, too far behind.
        (multiboot_header()[:-1] + b"\0", "is of an unknown kind"),
        (b"\x90" + multiboot_header(ADDRESSES, *[2 * MIB] * 5), "is of an unknown kind"),
        (bytes(8184) + multiboot_header(), "is of an unknown kind"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refusal(written(tmp_path, content))


def test_every_truncation(tmp_path: Path) -> None:
    whole = elf32([(4 * MIB, b"first", 4096)], 4 * MIB, head=HEADER)
    for size in range(len(whole) - len(HEADER) - 5 + 12, len(whole)):
        assert "copy it again" in refusal(written(tmp_path, whole[:size]))


def test_a_64_bit_kernel_stays_one(tmp_path: Path) -> None:
    """Its bytes may happen to hold a header; one with addresses is none by accident."""
    data = elf([(16 * MIB, b"\x90" * 4 + HEADER, 4096)])
    data += bytes(-data.index(HEADER) % 4)
    with KernelFile(written(tmp_path, data)) as file:
        assert isinstance(file.kernel, ElfKernel)


@pytest.mark.parametrize(
    ("physical", "said"),
    [(0, "where the machine's tables are"), (0x9_0000, "tables are"), (31 * MIB, "has not")],
)
def test_it_does_not_fit(tmp_path: Path, physical: int, said: str) -> None:
    path = written(tmp_path, elf32([(physical, b"x", 2 * MIB)], physical, head=HEADER))
    with (
        KernelFile(path) as file,
        GuestMemory.create(32 * MIB) as memory,
        pytest.raises(KernelError, match=said),
    ):
        file.kernel.load(memory)


def test_information() -> None:
    ranges = [
        MemoryRange(0, layout.LOW_RAM_END, MemoryKind.RAM),
        MemoryRange(layout.ACPI_GPA, layout.ACPI_SIZE, MemoryKind.ACPI),
        MemoryRange(1 * MIB, 63 * MIB, MemoryKind.RAM),
    ]
    data = information(0x6000, BootInfo(ranges, 0x20000, 0xE0000, (0x300_0000, 99)))
    words = struct.unpack_from("<29I", data)
    assert words[0] == 0b10_0100_1101
    assert words[1:3] == (639, 63 * 1024)
    assert words[4] == 0x20000
    assert words[5:7] == (1, 0x6000 + 116)
    assert struct.unpack_from("<IIII", data, 116) == (0x300_0000, 0x300_0000 + 99, 0, 0)
    assert words[11:13] == (3 * 24, 0x6000 + 132)
    assert struct.unpack_from("<IQQI", data, 132 + 24) == (20, 0xE0000, 128 * 1024, 3)
    assert data[words[16] - 0x6000 :] == b"pykvm\0"
    assert struct.unpack_from("<29I", information(0, BootInfo(ranges, 0, 0)))[5:7] == (0, 0)


def test_the_tests_own_image(tmp_path: Path) -> None:
    """Building it fills the cache for the emulated host. It is what objcopy makes of it."""
    path = written(tmp_path, image_32())
    with GuestMemory.create(16 * MIB) as memory, GuestMemory.create(16 * MIB) as other:
        first = loaded(path, memory)
        if shutil.which("objcopy"):
            flat = tmp_path / "flat"
            subprocess.run(["objcopy", "-O", "elf32-i386", image_64(), flat], check=True)
            second = loaded(flat, other)
            assert (first.entry, first.end) == (second.entry, second.end)
            assert memory.read(4 * MIB, MIB) == other.read(4 * MIB, MIB)
        assert first.longest_line == layout.COMMAND_LINE_SIZE - 1 - len("image ")


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = written(tmp_path, elf32([(4 * MIB, bytes(9000), 9000)], 4 * MIB, head=HEADER))
    with KernelFile(path) as file, GuestMemory.create(32 * MIB) as memory:
        os.truncate(path, 5000)
        with pytest.raises(KernelError, match="has become shorter"):
            file.kernel.load(memory)
