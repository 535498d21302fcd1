"""Instructions of an object, taken apart: mnemonic, operands, sizes."""

import re
from collections.abc import Container
from typing import Final, NamedTuple, Self

from pykvm.elisa.object_code import Instruction

__all__ = ["REGISTERS", "Immediate", "Memory", "Operand", "Operation", "Register"]


def _register_names() -> dict[str, tuple[str, int]]:
    names: dict[str, tuple[str, int]] = {}
    for one in ("ax", "bx", "cx", "dx"):
        whole = f"r{one}"
        names |= {whole: (whole, 8), f"e{one}": (whole, 4), one: (whole, 2)}
        names |= {f"{one[0]}l": (whole, 1), f"{one[0]}h": (whole, 1)}
    for one in ("si", "di", "bp", "sp"):
        whole = f"r{one}"
        names |= {whole: (whole, 8), f"e{one}": (whole, 4), one: (whole, 2), f"{one}l": (whole, 1)}
    for number in range(8, 16):
        whole = f"r{number}"
        names |= {whole: (whole, 8), f"{whole}d": (whole, 4), f"{whole}w": (whole, 2)}
        names[f"{whole}b"] = (whole, 1)
    return names


_NAMES: Final = _register_names()
REGISTERS: Final = tuple(dict.fromkeys(whole for whole, _ in _NAMES.values()))
_HIGH_BYTES: Final = frozenset({"ah", "bh", "ch", "dh"})
_WIDTHS: Final = {"b": 1, "w": 2, "l": 4, "q": 8}
_MEMORY: Final = re.compile(
    r"^(?:%[c-g]s:)?(-?(?:0x)?[0-9a-f]+)?(?:\((%\w+)?(?:,(%\w+)(?:,([1248]))?)?\))?$"
)


class Register(NamedTuple):
    """A general register, or a part of one."""

    name: str  # of all 64 bits
    size: int
    high: bool = False  # bits 8 to 15


class Immediate(NamedTuple):
    """A number in the instruction."""

    value: int


class Memory(NamedTuple):
    """A place in memory, as the instruction addresses it."""

    displacement: int
    base: str  # "" if there is none
    scaled: str
    scale: int


Operand = Register | Immediate | Memory


def _operand(text: str, following: int) -> Operand:
    if text.startswith("$"):
        return Immediate(int(text[1:], 0))
    if text.startswith("%") and text[1:] in _NAMES:
        name, size = _NAMES[text[1:]]
        return Register(name, size, text[1:] in _HIGH_BYTES)
    found = _MEMORY.match(text)
    if not found:
        raise ValueError(f"an operand of unknown form: {text}")
    displacement, base, index, scale = found.groups(default="")
    distance = int(displacement or "0", 0 if "x" in displacement else 16)
    if base == "%rip":
        return Memory(distance + following, "", "", 1)
    base, scaled = (_NAMES[one[1:]][0] if one[1:] in _NAMES else "" for one in (base, index))
    return Memory(distance, base, scaled, int(scale or "1"))


class Operation(NamedTuple):
    """An instruction, taken apart.

    Attributes:
        address: its address.
        mnemonic: its mnemonic, without the suffix that tells the operands' size.
        operands: sources first.
        size: bytes of its operands.
        narrow: bytes of the source of an extension.
        prefixes: its prefixes.
        text: all of it.
    """

    address: int
    mnemonic: str
    operands: tuple[Operand, ...]
    size: int
    narrow: int
    prefixes: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, instruction: Instruction, following: int, known: Container[str]) -> Self:
        """Take an instruction apart.

        Args:
            instruction: any that objects may use, other than jumps and calls.
            following: address of the next one.
            known: mnemonics without the suffix that tells the operands' size.

        Raises:
            ValueError: it has a form that is not known here.
        """
        mnemonic = instruction.mnemonic
        texts = re.findall(r"[^,(]*\([^)]*\)|[^,]+", instruction.operands)
        operands = tuple(_operand(text, following) for text in texts)
        narrow = 0
        extension = _EXTENSION.fullmatch(mnemonic)
        if extension and operands:
            mnemonic, narrow, size = "movx", _WIDTHS[extension[1]], _WIDTHS[extension[2]]
        else:
            mnemonic, size = _without_suffix(mnemonic, known)
            # A shift's count may be in %cl, and the operand of crc32 may be narrow.
            registers = [one.size for one in operands if isinstance(one, Register)]
            if not size:
                size = registers[-1] if registers else 8
        return cls(
            instruction.address,
            mnemonic,
            operands,
            size,
            narrow,
            instruction.prefixes,
            instruction.text,
        )

    def is_mark(self) -> bool:
        """Return whether this is an instruction of guest/include/elisa_nospec.h."""
        return "ds" in self.prefixes and self.mnemonic in ("and", "cmp")

    def is_repeated(self) -> bool:
        """Return whether this is a string instruction that rcx counts."""
        return any(prefix.startswith("rep") for prefix in self.prefixes)


_EXTENSION: Final = re.compile(r"mov[sz]([bwl])([wlq])")


def _without_suffix(mnemonic: str, known: Container[str]) -> tuple[str, int]:
    """Return the mnemonic without its suffix, and the suffix's size or 0."""
    if mnemonic in known:
        return mnemonic, 0
    if mnemonic.startswith(("cmov", "set")):
        return ("cmov", 0) if mnemonic.startswith("cmov") else ("set", 1)
    if mnemonic.startswith("prefetch"):
        return "prefetch", 1
    if mnemonic[:-1] in known and mnemonic[-1] in _WIDTHS:
        return mnemonic[:-1], _WIDTHS[mnemonic[-1]]
    raise ValueError(f"an instruction whose effect is not known: {mnemonic}")
