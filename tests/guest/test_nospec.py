"""Indexes that stay in bounds under speculation: guest/include/elisa_nospec.h."""

import ctypes
import random
import re
import subprocess
from pathlib import Path

import pytest

from pykvm.resources import GUEST_SOURCES

pytestmark = pytest.mark.unit

SOURCE = """
#include "elisa_nospec.h"
uint64_t at(uint64_t index, uint64_t size) { return elisa_index_nospec(index, size); }
uint64_t masked(uint64_t index, uint64_t size) { return elisa_mask_nospec(index, size); }
uint64_t constant(uint64_t index) { return elisa_mask_nospec(index, 64); }
void barrier(void) { elisa_barrier_nospec(); }
"""
TOP = 2**64 - 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nospec")
    source, target = directory / "at.c", directory / "at.so"
    source.write_text(SOURCE)
    include = GUEST_SOURCES / "include"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(target)],
        check=True,
    )
    return target


def test_values(library: Path) -> None:
    at = ctypes.CDLL(str(library)).at
    at.argtypes, at.restype = [ctypes.c_uint64] * 2, ctypes.c_uint64
    edges = [0, 1, 2, 63, 64, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, TOP - 1, TOP]
    dice = random.Random(1)
    pairs = [(index, size) for index in edges for size in edges]
    pairs += [(dice.randrange(200), dice.randrange(200)) for _ in range(2000)]
    for index, size in pairs:
        assert at(index, size) == (index if index < size else 0), (index, size)


def test_values_of_masks(library: Path) -> None:
    functions = ctypes.CDLL(str(library))
    for function in (functions.masked, functions.constant):
        function.argtypes, function.restype = [ctypes.c_uint64] * 2, ctypes.c_uint64
    for index in (0, 1, 63, 64, 2**31 + 5, 2**32 - 1, 2**32, 2**63, TOP):
        for bits in range(64):
            size = 1 << bits
            assert functions.masked(index, size) == index % size, (index, size)
        assert functions.constant(index, 0) == index % 64


def code(library: Path, function: str) -> list[str]:
    """Return the instructions of a function, with a mark as a word before the mnemonic."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={function}", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return re.findall(r"^ +[0-9a-f]+:\t((?:ds )?\w+)", listing, re.MULTILINE)


def test_no_branch(library: Path) -> None:
    """There is no branch; the instructions that bound an index are marked for the toolchain."""
    assert {"ds cmp", "sbb", "ds and"} <= set(code(library, "at"))
    assert "ds and" in code(library, "masked")
    assert code(library, "constant") == ["mov", "ds and", "ret"]
    assert code(library, "barrier") == ["lfence", "ret"]
    for function in ("at", "masked", "constant"):
        assert not [one for one in code(library, function) if one.startswith(("j", "call", "cmov"))]
