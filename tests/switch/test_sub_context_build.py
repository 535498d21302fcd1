"""The switch compiled as for the sub context contains nothing that cannot be there."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest

from pykvm.resources import GUEST_SOURCES
from pykvm.switch._native import lib
from tests.rigs.switch.native_rig import frame, make_rig
from tests.rigs.switch.single_step import count_instructions
from tests.rigs.switch.variants import AS_BUILT, load_build

pytestmark = pytest.mark.unit

SUB_CONTEXT_FLAGS = [
    "-ffreestanding",
    "-nostdlib",
    "-mgeneral-regs-only",
    "-O2",
    "-fPIE",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
]


def compile_switch(output: Path, *more: str) -> Path:
    source = GUEST_SOURCES / "switch/switch.c"
    include = f"-I{GUEST_SOURCES / 'include'}"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        ["cc", *SUB_CONTEXT_FLAGS, *warnings, *more, include, "-o", output, source], check=True
    )
    return output


def test_it_needs_no_other_code_and_no_memory_of_its_own(tmp_path: Path) -> None:
    built = compile_switch(tmp_path / "switch.o", "-c")
    symbols = subprocess.run(["nm", built], check=True, capture_output=True, text=True).stdout
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols.splitlines()}
    assert kinds.pop("elisa_serve") == "T"
    assert set(kinds.values()) <= {"t", "r", "W"}, f"undefined or writable: {kinds}"


def test_no_bytes_of_it_are_a_vmfunc(tmp_path: Path) -> None:
    built = compile_switch(tmp_path / "switch.o", "-c")
    text = tmp_path / "text"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, text], check=True)
    code = text.read_bytes()
    assert len(code) > 1000
    assert b"\x0f\x01\xd4" not in code


def test_it_executes_as_many_instructions_as_the_native_build(tmp_path: Path) -> None:
    """The native count is therefore valid for the sub context, apart from effects of -fPIE."""
    sub_context = load_build(str(compile_switch(tmp_path / "switch.so", "-shared")))
    counts = []
    for build in (AS_BUILT, sub_context):
        rig = make_rig()
        rig.teach()
        sent = [frame(1, 0, mark=mark) for mark in range(32)]
        for slot, one in enumerate(sent):
            rig.ports[0].put(slot, one)
        send = partial(build.serve, lib.SWITCH_OP_SEND, 0, 32, rig)
        counts.append(count_instructions(build.address, send))
        assert rig.ports[1].receive(0) == sent
    assert abs(counts[0] - counts[1]) < 3 * len(sent), counts
