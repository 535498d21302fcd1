"""The gate page, decoded from every byte: the machine code keeps the promises of `gate.S`.

objdump decides where instructions start and what they are. A guest chooses the byte at which it
enters, and every general register but EAX and ECX; the transient slot is zero then.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.trusted_images import VMFUNC, crossing_images
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain import compiler
from pykvm.toolchain.elf import ElfFile

pytestmark = pytest.mark.unit

GATE = crossing.GATE_OFFSET
SLOT = crossing.GATE_LIST_OFFSET + 8  # the transient slot, relative to the crossing base
DATA = crossing.GATE_DATA_OFFSET
LAST_VMFUNC = PAGE_SIZE - len(VMFUNC)

# Instructions that only read their last operand in memory (AT&T syntax).
READ_ONLY = re.compile(r"^(cmp|test|fcom|scas|jmp|nop)")
# Instructions that write memory without an operand that says so.
HIDDEN_WRITE = re.compile(r"^(push|call|enter|stos|movs|ins|xsave|fxsave|lcall|int\b|into|syscall)")
STOP = re.compile(r"^(int3|int1|\(bad\)|ud[012]|lock int3|hlt)")


@dataclass(frozen=True)
class Instruction:
    offset: int
    length: int
    text: str


@pytest.fixture(scope="module")
def gate() -> bytes:
    return crossing_images().gate_page


@pytest.fixture(scope="module")
def decode(gate: bytes, tmp_path_factory: pytest.TempPathFactory) -> "Decoder":
    return Decoder(tmp_path_factory.mktemp("gate") / "gate.bin", gate)


class Decoder:
    """Instructions of a page by the offset at which the decoder starts."""

    def __init__(self, file: Path, page: bytes) -> None:
        if not shutil.which("objdump"):
            pytest.skip("no objdump: apt-get install binutils")
        file.write_bytes(page)
        self._file = file
        self._page = page
        self._known: dict[int, Instruction] = {}

    def at(self, offset: int) -> Instruction:
        """Return the instruction that starts at `offset`; an offset past the page is a fault."""
        if offset not in self._known:
            self._known[offset] = self._decode(offset)
        return self._known[offset]

    def _decode(self, offset: int) -> Instruction:
        if self._page[offset] == 0xCC:  # most of the page; saves thousands of runs of objdump
            return Instruction(offset, 1, "int3")
        listing = subprocess.run(
            [
                *("objdump", "-D", "-w", "-b", "binary", "-m", "i386:x86-64"),
                *(f"--start-address={offset}", f"--stop-address={min(offset + 15, PAGE_SIZE)}"),
                str(self._file),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        line = next(line for line in listing.splitlines() if re.match(rf" +{offset:x}:\t", line))
        _, raw, text = line.split("\t", 2)
        text = re.sub(r"\s+", " ", text.split("#")[0]).strip()
        return Instruction(offset, len(raw.split()), text)


def last_operand(instruction: Instruction) -> str:
    return re.split(r",(?![^(]*\))", instruction.text.rsplit(" ", 1)[-1])[-1]


def rip_target(instruction: Instruction) -> int | None:
    """Return the address of a RIP-relative operand, relative to the crossing base."""
    found = re.search(r"(-?)0x([0-9a-f]+)\(%rip\)", instruction.text)
    if not found:
        return None
    displacement = int(found[2], 16) * (-1 if found[1] else 1)
    return GATE + instruction.offset + instruction.length + displacement


def is_store(instruction: Instruction) -> bool:
    if STOP.match(instruction.text):
        return False
    if HIDDEN_WRITE.match(instruction.text):
        return True
    return "(" in last_operand(instruction) and not READ_ONLY.match(instruction.text)


def paths(decode: Decoder, entry: int) -> list[list[Instruction]]:
    """Return every path from `entry` to a stop, an indirect jump or the end of the page."""
    finished: list[list[Instruction]] = []
    waiting: list[tuple[list[Instruction], int]] = [([], entry)]
    while waiting:
        path, offset = waiting.pop()
        if not 0 <= offset < PAGE_SIZE:  # no other page is executable in the gate context
            finished.append(path)
            continue
        instruction = decode.at(offset)
        path = [*path, instruction]
        assert len(path) < 64, f"no end from {entry:#x}"
        after = offset + instruction.length
        branch = re.match(r"^(j\w+|loop\w*)(?:,p[nt])? (0x[0-9a-f]+)$", instruction.text)
        if STOP.match(instruction.text) or instruction.text.startswith("jmp *"):
            finished.append(path)
        elif branch:
            target = int(branch[2], 16)
            target = target - (1 << 64) if target >> 63 else target
            waiting.append((path, target))
            if branch[1] != "jmp":
                waiting.append((path, after))
        else:
            waiting.append((path, after))
    return finished


ENTRIES = [*range(PAGE_SIZE)]


def test_the_page_is_int3_but_for_the_code(gate: bytes) -> None:
    assert len(gate) == PAGE_SIZE
    assert gate.count(0xCC) > PAGE_SIZE - 100
    assert gate.count(VMFUNC) == 1
    assert gate.endswith(VMFUNC)


def test_nothing_but_the_transient_slot_is_ever_written(decode: Decoder) -> None:
    stores = {
        instruction: rip_target(instruction)
        for offset in ENTRIES
        if is_store(instruction := decode.at(offset))
    }
    assert set(stores.values()) == {SLOT}, stores
    # The store, the clearing of the slot, and both without their REX prefix.
    assert len(stores) == 4, stores


def test_short_displacements_would_be_unsafe(tmp_path: Path) -> None:
    """Control: with the list where the sub context has it, the guest could write anywhere."""
    source = GUEST_SOURCES / "crossing" / "gate.S"
    near = {
        "ELISA_GATE_OFFSET": GATE,
        "ELISA_GATE_LIST_OFFSET": crossing.LIST_OFFSET,
        "ELISA_GATE_DATA_OFFSET": crossing.LIST_OFFSET + PAGE_SIZE,
    }
    compiled = compiler.compile_source(source, tmp_path / "gate.o", defines=near)
    page = ElfFile.parse(compiled.read_bytes()).section(".elisa.gate").data
    decode = Decoder(tmp_path / "near.bin", page)
    stores = {decode.at(offset).text for offset in ENTRIES if is_store(decode.at(offset))}
    assert "add %al,(%rax)" in stores


def test_no_displacement_holds_a_zero_byte(gate: bytes, decode: Decoder) -> None:
    """`00 00` is a write through rax, and `00 xx` may be one. One zero is before int3."""
    zeros = [offset for offset in ENTRIES if gate[offset] == 0]
    assert len(zeros) == 1
    assert gate[zeros[0] + 1] == 0xCC
    assert decode.at(zeros[0]).text == "add %cl,%ah"


@pytest.mark.attack("T2")
@pytest.mark.attack("T23")
def test_every_path_is_safe(decode: Decoder) -> None:
    """On every path from every byte, the comparison follows a store before the last VMFUNC."""
    ends = set()
    for entry in ENTRIES:
        for path in paths(decode, entry):
            texts = [instruction.text for instruction in path]
            stored = [at for at, instruction in enumerate(path) if is_store(instruction)]
            reached = path[-1].offset == LAST_VMFUNC or texts[-1].startswith(("vmfunc", "jmp *"))
            ends.add(texts[-1] if not path[-1].text.startswith("jmp *") else "jmp *")
            if not stored or not reached:
                continue
            # Only the opening store can lead to a VMFUNC, and only through these instructions.
            assert len(stored) == 1, texts
            after = [re.sub(r"-0x[0-9a-f]+\(%rip", "X(%rip", t) for t in texts[stored[0] + 1 :]]
            assert after == [
                "mov X(%rip),%r8",
                "cmp X(%rip),%r8",
                "jne 0xfc2",
                "lea 0x1(%rax),%ecx",
                "cld",
                "lfence",
                "vmfunc",
            ], texts
            assert rip_target(path[stored[0] + 1]) == SLOT
            assert rip_target(path[stored[0] + 2]) == DATA
    assert {"int3", "vmfunc", "jmp *"} <= ends


def test_a_mismatch_clears_the_slot_and_stops(decode: Decoder) -> None:
    official = next(
        o
        for o in ENTRIES
        if decode.at(o).text.startswith("mov") and rip_target(decode.at(o)) == DATA
    )
    refused = [path for path in paths(decode, official) if path[-1].text == "int3"]
    assert len(refused) == 1
    assert refused[0][-2].text.startswith("andq $0x0,")
    assert rip_target(refused[0][-2]) == SLOT


def test_the_official_way_is_twelve_instructions(decode: Decoder) -> None:
    (start,) = paths(decode, 0)
    assert [i.text for i in start][1:] == ["add $0xfe0,%r8w", "jmp *%r8"]
    (allowed,) = [path for path in paths(decode, 0xFD8) if path[-1].text == "vmfunc"]
    assert len(start) + len(allowed) == 12
