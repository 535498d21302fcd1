"""Kernels in files: what each kind is taken for, and files that are none or not whole."""

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import PykvmError
from pykvm.machine.linux.boot import BootInfo, KernelError, MemoryKind, MemoryRange
from pykvm.machine.linux.bzimage import BzImage
from pykvm.machine.linux.compression import (
    KernelCompressionError,
    compression_of,
    decompress_payload,
)
from pykvm.machine.linux.elf_kernel import ElfKernel
from pykvm.machine.linux.kernel_file import KernelFile, unpacked
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.kernel_files import PVH_NOTE, bzimage, elf, note
from tests.rigs.messages import one_line

pytestmark = pytest.mark.unit

INFO = BootInfo([MemoryRange(0, 1 * MIB, MemoryKind.RAM)], command_line=0x20000, rsdp=0xE0000)


def written(directory: Path, content: bytes, name: str = "kernel") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def refusal(path: Path, *, unpack: bool = False) -> str:
    with pytest.raises(KernelError) as caught:
        KernelFile(path, unpack=unpack)
    return one_line(caught.value)


# ---- ELF ----------------------------------------------------------------------------------------


def test_an_elf_kernel(tmp_path: Path) -> None:
    data = elf([(16 * MIB, b"first", 4096), (17 * MIB, b"second", 8192)])
    with KernelFile(written(tmp_path, data)) as file, GuestMemory.create(32 * MIB) as memory:
        kernel = file.kernel
        assert isinstance(kernel, ElfKernel)
        assert (kernel.entry, kernel.end) == (0x100_0000, 17 * MIB + 8192)
        kernel.load(memory)
        assert memory.read(16 * MIB, 6) == b"first\0"
        assert memory.read(17 * MIB, 7) == b"second\0"


def test_it_does_not_fit(tmp_path: Path) -> None:
    for physical, size in ((40 * MIB, 4096), (31 * MIB, 2 * MIB), (1 << 63, 1 << 63)):
        path = written(tmp_path, elf([(16 * MIB, b"x", 4096), (physical, b"x", size)]))
        with (
            KernelFile(path) as file,
            GuestMemory.create(32 * MIB) as memory,
            pytest.raises(KernelError, match="which the guest has not"),
        ):
            file.kernel.load(memory)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (elf([(0, b"x", 4096)], notes=b""), "no PVH entry point"),
        (elf([(0, b"x", 4096)], note(b"GNU\0", 18, bytes(4))), "no PVH entry point"),
        (elf([(0, b"x", 4096)], note(b"Xen\0", 18, b"")), "no PVH entry point"),
        (elf([(0, b"x", 4096)], PVH_NOTE[:10]), "no PVH entry point"),
        (elf([]), "has nothing to load"),
        (elf([(0, b"xyz", 2)]), "truncated"),
        (elf([(2 * MIB, b"x", 4096)]), "begins at 0x1000000, where nothing of it is"),
        (elf([(0, b"x", 4096)], machine=183), "for machine 183"),
        (elf([(0, b"x", 4096)], ident=b"\x7fELF\x01\x01\x01"), "little-endian ELF64"),
        (elf([(0, b"x", 1)] * 70), "71 segments"),
    ],
)
def test_other_elf_files(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refusal(written(tmp_path, content))


def test_every_truncation_of_an_elf_file(tmp_path: Path) -> None:
    whole = elf([(16 * MIB, b"first", 4096)])
    for size in range(4, len(whole)):
        assert "copy it again" in refusal(written(tmp_path, whole[:size]))


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = written(tmp_path, elf([(16 * MIB, bytes(100_000), 1 * MIB)]))
    with KernelFile(path) as file, GuestMemory.create(32 * MIB) as memory:
        os.truncate(path, 5000)
        with pytest.raises(KernelError, match="has become shorter"):
            file.kernel.load(memory)


@given(st.binary(max_size=400), st.integers(4, 400), st.binary(max_size=16))
@settings(max_examples=300, deadline=None)
def test_anything_behind_the_first_bytes(start: bytes, at: int, change: bytes) -> None:
    """Whatever a file holds, it is a kernel that loads, or refused in one line."""
    base = bytearray(elf([(1 * MIB, b"code", 4096)]) + bytes(64))
    base[at : at + len(change)] = change
    for content in (
        bytes(base),
        b"\x7fELF\x02\x01" + start,
        b"\x7fELF\x02\x01" + bytes(40) + start,
    ):
        with os.fdopen(os.memfd_create("kernel"), "r+b") as file:
            file.write(content)
            file.flush()
            try:
                kernel = ElfKernel(file.fileno(), "kernel")
                with GuestMemory.create(4 * MIB) as memory:
                    kernel.load(memory)
            except PykvmError as error:
                one_line(error)


# ---- bzImage ------------------------------------------------------------------------------------


def test_a_bzimage(tmp_path: Path) -> None:
    path = written(tmp_path, bzimage(b"packed", longest_line=100))
    with KernelFile(path) as file, GuestMemory.create(32 * MIB) as memory:
        kernel = file.kernel
        assert isinstance(kernel, BzImage)
        assert (kernel.end, kernel.longest_line) == (17 * MIB, 100)
        assert kernel.payload() == b"packed"
        kernel.load(memory)
        assert memory.read(1 * MIB, 0x406) == b"\x90" * 0x400 + b"packed"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bzimage(b"", version=0x20B), "no 64-bit entry point"),
        (bzimage(b"", xloadflags=0), "no 64-bit entry point"),
        (bzimage(b"packed")[:-1], "truncated"),
        (bzimage(b"packed")[:700], "truncated"),
        (bzimage(b"")[:0x210], "no bzImage"),
    ],
)
def test_other_bzimages(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refusal(written(tmp_path, content))


@pytest.mark.parametrize(
    ("preferred", "init_size"), [(31 * MIB, 2 * MIB), (1 << 63, 4096), (0, 0xFFFF_FFFF)]
)
def test_it_cannot_unpack_itself(tmp_path: Path, preferred: int, init_size: int) -> None:
    path = written(tmp_path, bzimage(b"x", preferred=preferred, init_size=init_size))
    with (
        KernelFile(path) as file,
        GuestMemory.create(32 * MIB) as memory,
        pytest.raises(KernelError, match="to unpack itself: give the guest"),
    ):
        file.kernel.load(memory)


# ---- compression --------------------------------------------------------------------------------


def _by(program: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        assert shutil.which(program), f"install {program}"
        options = ["-l"] if program == "lz4" else []
        return subprocess.run(
            [program, *options, "-c"], input=data, capture_output=True, check=True
        ).stdout

    return pack


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lambda data: lzma.compress(data, check=lzma.CHECK_CRC32)),
        ("lzma", lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)),
        ("lz4", _by("lz4")),
        ("zstd", _by("zstd")),
    ],
)
def test_compressions(
    name: str, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))
    kernel = elf([(16 * MIB, b"first" * 1000, 8192)])
    packed = pack(kernel)
    assert compression_of(packed) == name
    size = b"" if name == "gzip" else len(kernel).to_bytes(4, "little")
    path = written(tmp_path, bzimage(packed + size))
    assert unpacked(path).read_bytes() == kernel
    with KernelFile(path, unpack=True) as file:
        assert isinstance(file.kernel, ElfKernel)
    # Half of it is an error, whatever packed it, or at least no kernel.
    broken = written(tmp_path, bzimage(packed[: len(packed) // 2]), "broken")
    with pytest.raises(PykvmError, match="broken"):
        KernelFile(broken, unpack=True)


def test_an_unknown_compression(tmp_path: Path) -> None:
    with pytest.raises(KernelCompressionError, match="packed with something unknown"):
        decompress_payload(b"\x12\x34\x56\x78", "kernel")
    path = written(tmp_path, bzimage(gzip.compress(b"no kernel")))
    assert "holds no ELF kernel" in refusal(path, unpack=True)


# ---- other files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "is empty"),
        (b"070701000", "an initial RAM disk (cpio)"),
        (b"QFI\xfb\0\0\0\x03", "a disk image (qcow2)"),
        (b"!<arch>\ndebian-binary", "a Debian package"),
        (b"#!/bin/sh\n", "a script"),
        (gzip.compress(b"x"), "packed with gzip"),
        (b"MZ" + bytes(0x36) + b"ARM\x64", "a kernel for 64-bit Arm"),
        (b"MZ" + bytes(100), "a program for EFI or Windows"),
        (b"text\n", "of an unknown kind"),
    ],
)
def test_files_that_are_no_kernel(tmp_path: Path, content: bytes, kind: str) -> None:
    assert kind in refusal(written(tmp_path, content))


def test_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "No such file or directory" in refusal(tmp_path / "none")
    for name in (".", "pipe"):
        assert "no regular file" in refusal(tmp_path / name)
