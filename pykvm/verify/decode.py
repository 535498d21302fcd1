"""One instruction of a page, in 64-bit mode, from any byte.

An instruction that needs bytes behind its page is no instruction here: no page follows in the
contexts that are looked at, so fetching them faults.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

import iced_x86
from iced_x86 import Code, Decoder, DecoderError, Formatter, FormatterSyntax, Mnemonic

__all__ = ["Instruction", "Kind", "Page", "mnemonic_name"]

_LONGEST: Final = 15  # bytes of an instruction (SDM vol. 2A 2.3.11)


class Kind(Enum):
    """What decoding came to."""

    INSTRUCTION = "instruction"
    INVALID = "invalid opcode"
    STRADDLES = "goes on behind the page"


@dataclass(frozen=True)
class Instruction:
    """offset: of its first byte, relative to the crossing base; length: in bytes."""

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
    """Intel's mnemonic, upper case."""
    return _NAMES[instruction.raw.mnemonic]


class Page:
    """A page of code, offset: of its first byte, relative to the crossing base."""

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
        """The instruction whose first byte lies at `offset`, relative to the crossing base."""
        if offset not in self._known:
            self._known[offset] = self._decode(offset)
        return self._known[offset]

    def _decode(self, offset: int) -> Instruction:
        at = offset - self.offset
        # The address wraps below zero where a branch leads there; only differences matter.
        decoder = Decoder(64, self.code[at : at + _LONGEST], ip=offset)
        raw = decoder.decode()
        if raw.code != Code.INVALID:
            return Instruction(Kind.INSTRUCTION, offset, raw.len, raw, self._formatter.format(raw))
        kind = Kind.INVALID
        if decoder.last_error == DecoderError.NO_MORE_BYTES and at + _LONGEST > len(self.code):
            kind = Kind.STRADDLES
        return Instruction(kind, offset, max(raw.len, 1), raw, kind.value)
