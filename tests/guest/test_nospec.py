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


def test_no_branch(library: Path) -> None:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "--disassemble=at", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code = re.findall(r"^ +[0-9a-f]+:\t(\w+)", listing, re.MULTILINE)
    assert {"cmp", "sbb", "and"} <= set(code)
    assert not [one for one in code if one.startswith(("j", "call", "cmov"))]
