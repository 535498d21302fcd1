"""Checks of an object's code, made before anything reaches a guest.

There are two checks, of different strength:

- `find_vmfunc` searches everything that is mapped executable for the bytes of VMFUNC (0F 01 D4), at
  every byte, and across the boundaries of adjacent pages and parts. It is complete: code in a sub
  context, however it is entered, can switch contexts only by the one VMFUNC of its sub entry page.
- `check_instructions` decodes the object's code from symbol to symbol. Every instruction has to be
  one that C with general registers compiles to. No branch may be indirect, and every direct branch
  has to lead to the start of an instruction in the same listing. So nothing but the listing runs,
  as long as returns go back to their calls.

The second check is for mistakes, such as inline assembly or a compiler option. An object's author
is trusted, and a return address that a faulty object overwrites leads anywhere. Most of the
instructions that it refuses would exit to KVM, which serves nothing outside the default context;
the rest would depend on state that the guest chooses.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.toolchain.compiler import CompilerMissingError

__all__ = [
    "VMFUNC",
    "ForbiddenInstructionError",
    "IndirectBranchError",
    "Instruction",
    "StrayBranchError",
    "branch_target",
    "check_instructions",
    "disassemble",
    "find_vmfunc",
]

VMFUNC: Final = bytes.fromhex("0f01d4")

_SIZE = "[bwlq]?"  # AT&T suffix
_ALLOWED: Final = re.compile(
    "|".join(
        [
            # Moves and arithmetic of general registers and memory.
            r"mov" + _SIZE,
            r"movabs" + _SIZE,
            r"mov[sz][bwl][wlq]",
            r"(?:lea|xchg|xadd|cmpxchg|bswap|movbe|push|pop)" + _SIZE,
            r"cmpxchg(?:8|16)b",
            r"(?:add|adc|sub|sbb|and|or|xor|cmp|test|not|neg|inc|dec|mul|imul|div|idiv)" + _SIZE,
            r"(?:shl|sal|shr|sar|rol|ror|rcl|rcr|shld|shrd)" + _SIZE,
            r"(?:bt|bts|btr|btc|bsf|bsr|tzcnt|lzcnt|popcnt|crc32)" + _SIZE,
            r"cbtw|cwtl|cltq|cwtd|cltd|cqto",
            r"cmov(?:n?[abglopsce]e?|n?z|np|ns|no)",
            r"set(?:n?[abglopsce]e?|n?z|np|ns|no)",
            # String instructions; the sub entry relies on the gate's CLD, and so may an object.
            r"(?:movs|stos|lods|cmps|scas)[bwlq]?|cld",
            # Control flow: operands are checked below.
            r"j[a-z]+|call|ret|leave|nop[wl]?",
            # Order and hints; traps that end the object.
            r"lfence|mfence|sfence|pause|prefetch\w+|endbr64|ud2|int3|clc|stc|cmc",
        ]
    )
)
_PREFIXES: Final = re.compile(r"(?:(?:lock|rep|repn?z|data16|cs|ds|rex(?:\.\w+)?) )*")
# Registers that an object must not use: control, debug, vector, x87, mask and bounds registers,
# segment registers as operands, and memory addressed with FS and GS.
_FOREIGN: Final = re.compile(
    r"%(?:cr|db|dr|xmm|ymm|zmm|mm|st|k|bnd|tr)\d*\b|%[c-g]s\b(?!:)|%ss\b|%[fg]s:"
)
_LINE: Final = re.compile(r"^ *([0-9a-f]+):\t(.+)$")
_TARGET: Final = re.compile(r"^(?:0x)?([0-9a-f]+)(?: <|$)")


class ForbiddenInstructionError(PykvmError):
    """Object code with an instruction that objects must not use."""


class IndirectBranchError(PykvmError):
    """Object code that jumps to, or calls, an address in a register or in memory."""


class StrayBranchError(PykvmError):
    """Object code with a branch to something other than one of its instructions."""


class Instruction(NamedTuple):
    """A decoded instruction, in AT&T's syntax.

    Attributes:
        address: address in the linked file.
        text: all of it, as objdump writes it.
        prefixes: prefixes that the mnemonic does not tell, such as "ds" and "rep".
        mnemonic: without prefixes and branch hints.
        operands: sources first, separated by commas.
        function: the symbol before it.
    """

    address: int
    text: str
    prefixes: tuple[str, ...]
    mnemonic: str
    operands: str
    function: str


def find_vmfunc(parts: Iterable[tuple[int, bytes]]) -> list[int]:
    """Return where the bytes 0F 01 D4 begin in executable code, at any byte.

    Args:
        parts: offset and content of each executable part; a part that begins where another one
            ends is searched together with it.
    """
    runs: list[tuple[int, bytearray]] = []
    for offset, data in sorted(parts):
        if runs and runs[-1][0] + len(runs[-1][1]) == offset:
            runs[-1][1].extend(data)
        else:
            runs.append((offset, bytearray(data)))
    # The bytes cannot overlap themselves. re.finditer is all C, which matters on the emulated host.
    return [
        offset + match.start()
        for offset, data in runs
        for match in re.finditer(re.escape(VMFUNC), data)
    ]


def check_instructions(image: Path, name: str, section: str = ".text") -> None:
    """Decode a section of a linked object, and refuse instructions that objects must not use.

    Args:
        image: the linked ELF file.
        name: name of the object, for messages.
        section: name of the section.

    Raises:
        ForbiddenInstructionError: an instruction is not allowed in objects.
        IndirectBranchError: a jump or call is indirect.
        StrayBranchError: a branch leads to no instruction of the listing.
        CompilerMissingError: there is no objdump, which comes with the compiler.
    """
    listing = list(disassemble(image, section))
    starts = {instruction.address for instruction in listing}
    for one in listing:
        where = f"{one.function} of {name}"
        if not _ALLOWED.fullmatch(one.mnemonic) or _FOREIGN.search(one.operands):
            raise ForbiddenInstructionError(
                f"{where} holds `{one.text}`: objects run with general registers, in the "
                "guest's privilege level and flags",
                "write it in plain C",
            )
        if not one.mnemonic.startswith("j") and one.mnemonic != "call":
            continue
        if one.operands.startswith("*"):
            raise IndirectBranchError(
                f"{where} holds `{one.text}`, which a guest could train to speculate anywhere",
                "call functions by name, choose between them with if or switch",
            )
        if branch_target(one) not in starts:
            raise StrayBranchError(
                f"{where} holds `{one.text}`, which leads to no instruction of the object",
                "branch to labels of its own code",
            )


def branch_target(instruction: Instruction) -> int | None:
    """Return where a direct jump or call leads, or None."""
    target = _TARGET.match(instruction.operands)
    return int(target[1], 16) if target else None


def disassemble(image: Path, section: str = ".text") -> Iterator[Instruction]:
    """Yield the instructions of a section, from symbol to symbol.

    Raises:
        CompilerMissingError: there is no objdump, which comes with the compiler.
    """
    objdump = shutil.which("objdump")
    if objdump is None:
        raise CompilerMissingError("no objdump on this machine", install(["binutils"]))
    done = subprocess.run(
        [objdump, "-d", "-w", "-z", "--no-show-raw-insn", "-j", section, str(image)],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        check=True,
    )
    function = "code"
    for line in done.stdout.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
            continue
        found = _LINE.match(line)
        if not found:
            continue
        text = re.sub(r"\s+", " ", found[2].split("#")[0]).strip()
        bare = _PREFIXES.sub("", text, count=1)
        prefixes = tuple(text[: len(text) - len(bare)].split())
        mnemonic, _, operands = bare.partition(" ")
        # A conditional branch may have a hint, as in `jne,pt`.
        mnemonic = mnemonic.partition(",")[0]
        yield Instruction(int(found[1], 16), text, prefixes, mnemonic, operands.strip(), function)
