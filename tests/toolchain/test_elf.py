"""The ELF reader on files of the real toolchain and on damaged ones."""

import contextlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.machine.bare import build, layout
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain import compiler, elf
from pykvm.toolchain.elf import ElfError, ElfFile
from tests.rigs.sources import GUESTS

pytestmark = pytest.mark.unit


def image_bytes() -> bytes:
    bare = GUEST_SOURCES / "bare"
    return compiler.build(
        "bare-guest",
        [bare / "start.S", bare / "runtime.c", GUESTS / "selftest.c"],
        bare / "guest.ld",
        include=build.GUEST_INCLUDE,
        flags=build.GUEST_FLAGS,
        defines=build.GUEST_DEFINES,
    ).read_bytes()


@pytest.fixture(scope="module")
def data() -> bytes:
    return image_bytes()


def test_segments_as_readelf_shows_them(data: bytes, tmp_path: Path) -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf: apt-get install binutils")
    file = tmp_path / "image.elf"
    file.write_bytes(data)
    listing = subprocess.run(
        ["readelf", "-lW", str(file)], capture_output=True, text=True, check=True
    ).stdout
    expected = []
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["LOAD"]:
            flags = sum({"R": 4, "W": 2, "E": 1}[letter] for letter in "".join(words[6:-1]))
            expected.append((int(words[2], 16), int(words[5], 16), flags))
    image = ElfFile.parse(data)
    assert [(s.address, s.size, s.flags) for s in image.segments] == expected
    assert image.entry == image.address_of("_start") == layout.IMAGE_GPA


def test_symbols_and_sections(data: bytes) -> None:
    image = ElfFile.parse(data)
    text = image.section(".text")
    assert text.flags & elf.SHF_EXECINSTR
    assert text.address <= image.address_of("guest_main") < text.address + text.size
    bss = image.section(".bss")
    assert bss.data == b""
    assert bss.size > 0
    with pytest.raises(ElfError, match="no_such_symbol"):
        image.address_of("no_such_symbol")
    with pytest.raises(ElfError, match=r"no section \.none"):
        image.section(".none")


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\x7fELF",
        b"#!/bin/sh\n" + bytes(100),
        b"\x7fELF\x01" + bytes(100),  # 32 bits
        b"\x7fELF\x02\x02" + bytes(100),  # big-endian
        b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", 183) + bytes(100),  # arm64
    ],
    ids=["empty", "magic", "script", "32-bit", "big-endian", "arm64"],
)
def test_foreign_files(foreign: bytes) -> None:
    with pytest.raises(ElfError, match=r"some name: .*build it again"):
        ElfFile.parse(foreign, "some name")


@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(fraction: float) -> None:
    """The section headers are at the end of the file, so every cut loses some."""
    whole = image_bytes()
    with pytest.raises(ElfError):
        ElfFile.parse(whole[: int(len(whole) * fraction)])


@given(at=st.integers(0, 63), value=st.integers(0, 255))
def test_a_damaged_header_is_an_elf_error_or_harmless(at: int, value: int) -> None:
    damaged = bytearray(image_bytes())
    damaged[at] = value
    with contextlib.suppress(ElfError):  # no other exception
        ElfFile.parse(bytes(damaged))
