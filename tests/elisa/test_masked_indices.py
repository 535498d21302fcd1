"""Masked indices have to stay in registers: objects that the toolchain takes, and refuses."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.elisa import crossing, data_flow, instruction_effects
from pykvm.elisa.masked_indices import MaskedIndexError, UnfollowedCodeError
from pykvm.elisa.object_code import Instruction
from pykvm.elisa.protections import ALL, NOTHING_EXTRA, Extra, Protection, Without
from pykvm.elisa.trusted_images import SubImage, build_object
from pykvm.resources import GUEST_SOURCES, PACKAGE
from tests.rigs.masked_code import (
    BOUNDS,
    DERIVED,
    EVERY,
    FRESH,
    KEPT,
    KEPT_BY_CALLS,
    THROUGH_CALLS,
    THROUGH_MEMORY,
    assembled,
)

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

UNCHECKED = frozenset({Protection.CODE_CHECK})
THUNKS = frozenset({Protection.RETURN_THUNKS})
OBJECTS = [
    *sorted((GUEST_SOURCES / "objects").glob("*.c")),
    GUEST_SOURCES / "switch" / "switch.c",
    *(PACKAGE.parent / "examples" / name for name in ("adder.c", "shelf.c")),
    *sorted((PACKAGE.parent / "tests/rigs/objects").glob("[!w]*.c")),  # wild.c calls by pointer
]


def refused(tmp_path: Path, body: str, callee: str = "") -> MaskedIndexError:
    with pytest.raises(MaskedIndexError) as caught:
        assembled(tmp_path, body, callee)
    # Without the mark nothing is followed: it is the masked index that is refused, nothing else.
    if "mark" not in body:
        assert assembled(tmp_path, body, callee, first="")
    return caught.value


@pytest.mark.attack("T39")
@pytest.mark.parametrize("body", THROUGH_MEMORY.values(), ids=THROUGH_MEMORY)
def test_through_memory(tmp_path: Path, body: str) -> None:
    refused(tmp_path, body)


@pytest.mark.attack("T39")
@pytest.mark.parametrize(("body", "callee"), THROUGH_CALLS.values(), ids=THROUGH_CALLS)
def test_through_calls(tmp_path: Path, body: str, callee: str) -> None:
    refused(tmp_path, body, callee)


@pytest.mark.parametrize("text", DERIVED)
def test_what_is_computed_from_it(tmp_path: Path, text: str) -> None:
    kept = "mov %rcx, %r8; " + text + "; mov %r8, %rcx"
    refused(tmp_path, kept + "; push %rdx; pop %rdx; use")
    assert assembled(tmp_path, kept + "; use")


@pytest.mark.parametrize("text", FRESH)
def test_what_is_not(tmp_path: Path, text: str) -> None:
    assert assembled(tmp_path, text + "; push %rdx; pop %rdx; use")


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_kept(tmp_path: Path, body: str) -> None:
    assert assembled(tmp_path, body)


@pytest.mark.parametrize(("body", "callee"), KEPT_BY_CALLS.values(), ids=KEPT_BY_CALLS)
def test_kept_by_calls(tmp_path: Path, body: str, callee: str) -> None:
    assert assembled(tmp_path, body, callee)


@pytest.mark.attack("T39")
@pytest.mark.parametrize("body", BOUNDS.values(), ids=BOUNDS)
def test_what_bounds_an_index_comes_from_memory(tmp_path: Path, body: str) -> None:
    error = refused(tmp_path, body)
    assert "bounds an index by a value that was in memory" in error.problem
    register = body.replace("push %rsi; pop %rdx", "mov %rsi, %rdx")
    assert assembled(tmp_path, register.replace("8(%rsp), %rdi", "%rsi, %rdi"))
    unmodified = body.replace("mov %rsi, 8(%rsp)", "nop").replace("push %rsi; pop %rdx", "nop")
    assert assembled(tmp_path, unmodified), "memory that the object has not stored to"


def test_an_analysis_without_memory_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases above are refused for what they store, and not for anything else in them."""
    monkeypatch.setattr(data_flow.State, "store", lambda *_: None)
    for name in ("stored and loaded", "on one path", "in a loop", "copied by several"):
        assert assembled(tmp_path, THROUGH_MEMORY[name])


def test_the_error_says_where_and_what_to_do(tmp_path: Path) -> None:
    error = refused(tmp_path, "push %rdi; call f; pop %rdx; use", "nop")
    use, store = crossing.IMAGE_OFFSET + 0xC, crossing.IMAGE_OFFSET + 5
    assert error.problem == (
        f"elisa_serve of object.S, at {use:#x} (`mov (%rcx,%rdx,8),%rax`), uses a masked index "
        f"that was in memory: stored by elisa_serve at {store:#x} (`push %rdi`)"
    )
    assert error.next_step == (
        "keep it in a register: make the function smaller, mask it again where it is used, or call "
        f"elisa_barrier_nospec() after {store:#x}"
    )


@pytest.mark.parametrize(
    ("body", "callee", "says"),
    [
        ("call f", "test %rsi, %rsi; je 1f; sub $1, %rsi; call f; 1:", "nest 64 deep"),
        ("call f", "push %rsi", "another stack pointer"),
    ],
    ids=["recursion", "stack"],
)
def test_code_that_is_not_followed(tmp_path: Path, body: str, callee: str, says: str) -> None:
    with pytest.raises(UnfollowedCodeError, match=says):
        assembled(tmp_path, body, callee)
    assert assembled(tmp_path, body, callee, first="")  # nothing to follow


def test_too_many_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvm.elisa.masked_indices.MAX_STEPS", 10)
    with pytest.raises(UnfollowedCodeError, match="too many paths"):
        assembled(tmp_path, "nop; " * 10)


@pytest.mark.parametrize("text", EVERY)
def test_every_instruction_of_objects_has_an_effect(tmp_path: Path, text: str) -> None:
    assert assembled(tmp_path, text)


def test_an_instruction_without_an_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(instruction_effects._EFFECTS, "bswap")
    with pytest.raises(UnfollowedCodeError, match="holds `bswap %rax`, which nothing follows"):
        assembled(tmp_path, "bswap %rax")


@pytest.mark.parametrize(
    ("mnemonic", "operands", "says"),
    [("vpaddq", "%rax,%rbx", "effect is not known: vpaddq"), ("mov", "%xmm0,%rax", "%xmm0")],
)
def test_forms_that_are_not_known(mnemonic: str, operands: str, says: str) -> None:
    odd = Instruction(0, f"{mnemonic} {operands}", (), mnemonic, operands, "f")
    with pytest.raises(ValueError, match=says):
        instruction_effects.parse(odd, 8)


# ------------------------------------------------------------------------ C

C = """
#include "elisa_memory.h"
#include "elisa_object.h"
#include "elisa_nospec.h"

#define FULL() __asm__ volatile("" : : : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", \\
				"r9", "r10", "r11", "r12", "r13", "r14", "r15")

struct state { uint64_t at; uint64_t table[64]; };

static __attribute__((noipa)) void other(struct state *state)
{
	__asm__ volatile("" : : : "rbx", "rbp", "r12", "r13", "r14", "r15");
	state->table[0]++;
}

static __attribute__((noipa)) void choose(uint64_t *at, uint64_t from)
{
	*at = elisa_mask_nospec(from, 64);
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	struct state *state = (struct state *)env->shared;
	uint64_t at = elisa_index_nospec(a0, 64), sum = 0;

	(void)other;
	(void)choose;
	(void)a1;
	(void)a2;
	%s
	return sum;
}
"""
SPILLS = {
    "pressure": "FULL(); sum = state->table[at];",
    "a call": "other(state); sum = state->table[at];",
    "a loop": "for (uint64_t n = 0; n < a1; n++) { sum += READ_ONCE(state->table[at]); FULL(); }",
    "a local by its address": "choose(&at, a1); sum = state->table[at];",
    "a field of shared memory": "WRITE_ONCE(state->at, at); FULL();"
    "sum = state->table[READ_ONCE(state->at)];",
}
MENDED = {
    "pressure": "FULL(); elisa_barrier_nospec(); sum = state->table[at];",
    "a call": "other(state); sum = state->table[elisa_mask_nospec(at, 64)];",
    "a loop": "for (uint64_t n = 0; n < a1; n++) {"
    " sum += READ_ONCE(state->table[elisa_index_nospec(at, 64)]); FULL(); }",
    "a local by its address": "choose(&at, a1); elisa_barrier_nospec(); sum = state->table[at];",
    "a field of shared memory": "WRITE_ONCE(state->at, at); elisa_barrier_nospec();"
    "sum = state->table[READ_ONCE(state->at)];",
}


def compiled(
    tmp_path: Path, body: str, without: Without = ALL, extra: Extra = NOTHING_EXTRA
) -> SubImage:
    source = tmp_path / "object.c"
    source.write_text(C % body)
    return build_object([source], without=without, extra=extra)


@pytest.mark.attack("T39")
@pytest.mark.parametrize("extra", [NOTHING_EXTRA, THUNKS], ids=["plain", "thunks"])
@pytest.mark.parametrize("name", SPILLS)
def test_what_a_compiler_spills(tmp_path: Path, name: str, extra: Extra) -> None:
    with pytest.raises(MaskedIndexError, match=r"elisa_serve of object\.c"):
        compiled(tmp_path, SPILLS[name], extra=extra)
    assert compiled(tmp_path, MENDED[name], extra=extra)


@pytest.mark.control("T39")
def test_unchecked_the_spill_is_in_the_code(tmp_path: Path) -> None:
    """The index goes to the stack after it was masked, and is used as it comes back."""
    objdump = shutil.which("objdump")
    assert objdump
    image = compiled(tmp_path, SPILLS["pressure"], UNCHECKED)
    binary = tmp_path / "code"
    binary.write_bytes(image.parts[1].data)
    listing = subprocess.run(
        [objdump, "-Dw", "--no-show-raw-insn", "-b", "binary", "-m", "i386:x86-64", str(binary)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = [line.partition(":\t")[2].split() for line in listing.splitlines() if ":\t" in line]
    code = [" ".join(each) for each in words]
    mark = max(n for n, each in enumerate(code) if each.startswith("ds and"))
    index = code[mark].rpartition(",")[2]
    store = next(n for n, each in enumerate(code) if n > mark and f"mov {index}," in each)
    place = code[store].partition(",")[2]
    assert "(%rsp)" in place
    load = next(n for n, each in enumerate(code) if n > store and each.startswith(f"mov {place},"))
    back = code[load].rpartition(",")[2]
    assert any(f",{back},8)" in each for each in code[load + 1 :])
    assert not any("lfence" in each for each in code[mark:])


# ------------------------------------------------------------------ objects


@pytest.mark.parametrize("extra", [NOTHING_EXTRA, THUNKS], ids=["plain", "thunks"])
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_objects_of_the_repository(path: Path, extra: Extra) -> None:
    assert build_object([path], extra=extra)


def test_the_switch_without_its_second_masks(tmp_path: Path) -> None:
    """It masks a port and a transmit slot again where a call may have spilled the first ones."""
    source = (GUEST_SOURCES / "switch" / "switch.c").read_text()
    for again in (
        "\t\tfind_lane(&open, call, masked_port(to));\n\t\tclose_lane",
        "\t\tindex = transmit_slot(shared, first + done);\n",
    ):
        assert source.count(again) == 1
        edited = tmp_path / "switch.c"
        edited.write_text(source.replace(again, "\t\tclose_lane" if "close" in again else ""))
        with pytest.raises(MaskedIndexError, match=r"of switch\.c"):
            build_object([edited])
