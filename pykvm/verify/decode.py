"""Decoder of a page's instructions, in 64-bit mode, from any byte.

An instruction that goes beyond its page does not count as one: no page follows in the contexts at
hand, so fetching it faults.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

import iced_x86
from iced_x86 import Code, Decoder, DecoderError, Formatter, FormatterSyntax, Mnemonic

__all__ = ["Instruction", "Kind", "Page", "mnemonic_name"]

_LONGEST: Final = 15  # bytes of an instruction (SDM vol. 2A 2.3.11)


class Kind(Enum):
    """Result of decoding."""

    INSTRUCTION = "instruction"
    INVALID = "invalid opcode"
    STRADDLES = "goes on behind the page"


@dataclass(frozen=True)
class Instruction:
    """A decoded instruction.

    Attributes:
        kind: whether the bytes are an instruction.
        offset: offset of its first byte from the crossing base.
        length: bytes.
        raw: the instruction as iced decodes it.
        text: its assembly text.
    """

    kind: Kind
    offset: int
    length: int
    raw: iced_x86.Instruction
    text: str

    @property
    def end(self) -> int:
        """Offset of the next instruction."""
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{self.offset:#x}: {self.text}"


_NAMES: Final = {
    value: name
    for name, value in vars(Mnemonic).items()
    if isinstance(value, int) and name.isupper()
}


def mnemonic_name(instruction: Instruction) -> str:
    """Return Intel's mnemonic, in upper case."""
    return _NAMES[instruction.raw.mnemonic]


class Page:
    """A page of code.

    Args:
        offset: offset of its first byte from the crossing base.
        code: its bytes.
    """

    def __init__(self, offset: int, code: bytes) -> None:
        self.offset = offset
        self.code = code
        self._known: dict[int, Instruction] = {}
        self._formatter = Formatter(FormatterSyntax.GAS)

    def __contains__(self, offset: int) -> bool:
        return self.offset <= offset < self.end

    @property
    def end(self) -> int:
        return self.offset + len(self.code)

    def at(self, offset: int) -> Instruction:
        """Return the instruction whose first byte is at `offset` from the crossing base."""
        if offset not in self._known:
            self._known[offset] = self._decode(offset)
        return self._known[offset]

    def _decode(self, offset: int) -> Instruction:
        at = offset - self.offset
        # A branch may lead to an address below zero, which wraps; only differences matter.
        decoder = Decoder(64, self.code[at : at + _LONGEST], ip=offset)
        raw = decoder.decode()
        if raw.code != Code.INVALID:
            return Instruction(Kind.INSTRUCTION, offset, raw.len, raw, self._formatter.format(raw))
        kind = Kind.INVALID
        if decoder.last_error == DecoderError.NO_MORE_BYTES and at + _LONGEST > len(self.code):
            kind = Kind.STRADDLES
        return Instruction(kind, offset, max(raw.len, 1), raw, kind.value)
