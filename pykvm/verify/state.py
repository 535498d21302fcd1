"""The symbolic state of a vCPU in a context: registers, flags, memory, and the path so far.

Values are z3 bit vectors and booleans. Addresses are relative to the crossing base, which is
itself a symbol: any multiple of 2 MiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import z3

from pykvm.elisa import crossing

__all__ = [
    "BASE",
    "FLAGS",
    "GENERAL",
    "MAPPED",
    "SLOT_OFFSETS",
    "STATUS",
    "Expression",
    "Load",
    "Memory",
    "Solver",
    "State",
    "StateRegion",
    "fresh",
    "fresh_flag",
    "truth",
    "value",
]

Expression = Any
"""A z3 bit vector or boolean; z3 has no types of its own."""

GENERAL: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""General registers, by their number in instructions."""

STATUS: Final = ("cf", "pf", "af", "zf", "sf", "of")
FLAGS: Final = (*STATUS, "df", "ac")

MAPPED: Final = "memory"
"""Prefix of the symbols that stand for the content of memory; `fresh` numbers them."""

_BLOCK: Final = z3.BitVec("block", 43)
BASE: Final = z3.Concat(_BLOCK, z3.BitVecVal(0, 21))
"""The crossing base."""

_numbers = itertools.count()


def value(number: int, bits: int = 64) -> Expression:
    """Return a constant of `bits` bits."""
    return z3.BitVecVal(number, bits)


def truth(flag: bool) -> Expression:
    return z3.BoolVal(flag)


def fresh(name: str, bits: int = 64) -> Expression:
    """Return a new symbol, which may have any value."""
    return z3.BitVec(f"{name}!{next(_numbers)}", bits)


def fresh_flag(name: str) -> Expression:
    return z3.Bool(f"{name}!{next(_numbers)}")


@dataclass(frozen=True)
class StateRegion:
    """Whole pages of a context.

    Attributes:
        name: shown in findings.
        offset: offset of the first byte from the crossing base.
        size: bytes.
        writable: whether the context maps them writable.
        executable: whether the context maps them executable.
    """

    name: str
    offset: int
    size: int
    writable: bool = False
    executable: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.size

    def holds(self, offset: int, size: int) -> bool:
        """Return whether all `size` bytes from `offset` on lie in the region."""
        return self.offset <= offset and offset + size <= self.end


@dataclass(frozen=True)
class Load:
    """A read of memory whose content the model leaves open.

    Attributes:
        symbol: the symbol that stands for the content.
        address: linear address.
        size: bytes.
        number: number of the instruction on its path, from 1.
    """

    symbol: Expression
    address: Expression
    size: int
    number: int


@dataclass(frozen=True)
class Memory:
    """Memory that a context maps, and the bytes of it that the model follows.

    Bytes that it does not follow may hold anything, and something else at each read.

    Attributes:
        regions: everything that is mapped.
        known: the bytes that the model follows, by offset.
    """

    regions: tuple[StateRegion, ...]
    known: Mapping[int, Expression] = field(default_factory=dict)

    def region(self, offset: int, size: int) -> StateRegion | None:
        """Return the region of an access, or None if one of its bytes is not mapped."""
        for region in self.regions:
            if region.holds(offset, size):
                return region
        # An access may straddle regions that follow each other.
        parts = [r for r in self.regions if r.offset < offset + size and offset < r.end]
        if sum(min(r.end, offset + size) - max(r.offset, offset) for r in parts) == size:
            first = parts[0]
            return replace(first, writable=all(r.writable for r in parts), name="several")
        return None

    def word(self, offset: int) -> Expression:
        """Return eight bytes that the model follows."""
        return z3.simplify(z3.Concat([self.known[offset + at] for at in reversed(range(8))]))

    def with_bytes(self, offset: int, content: Expression) -> Memory:
        """Return this memory after a write."""
        known = dict(self.known)
        for at in range(content.size() // 8):
            known[offset + at] = z3.simplify(z3.Extract(8 * at + 7, 8 * at, content))
        return replace(self, known=known)

    def with_word(self, offset: int, content: Expression) -> Memory:
        return self.with_bytes(offset, content)


SLOT_OFFSETS: Final = {
    crossing.GATE_LIST_OFFSET: crossing.GATE_LIST_OFFSET + 8,
    crossing.LIST_OFFSET: crossing.LIST_OFFSET + 8,
}
"""Offsets of the transient slot in a gate and in a sub context, by that of the list page."""


@dataclass(frozen=True)
class State:
    """A vCPU between two instructions.

    Attributes:
        pc: offset of the next instruction from the crossing base.
        registers: general registers by name.
        flags: status flags by name.
        others: the other bits of RFLAGS.
        memory: the context's memory.
        conditions: what holds on this path.
        trace: offsets of the instructions so far.
        loads: reads of memory whose content the model leaves open.
        fenced: whether an LFENCE has run.
        buffers_clear: whether a VERW has run, and no access to memory after it.
        opaque: whether the content of memory has changed state that the model does not follow
            (x87).
    """

    pc: int
    registers: Mapping[str, Expression]
    flags: Mapping[str, Expression]
    others: Expression
    memory: Memory
    conditions: tuple[Expression, ...] = ()
    trace: tuple[int, ...] = ()
    loads: tuple[Load, ...] = ()
    fenced: bool = False
    buffers_clear: bool = False
    opaque: bool = False

    @classmethod
    def arbitrary(cls, pc: int, memory: Memory) -> State:
        """Create a state with any registers and flags; symbols are named after the registers."""
        return cls(
            pc,
            {name: z3.BitVec(name, 64) for name in GENERAL},
            {name: z3.Bool(name) for name in FLAGS},
            z3.BitVec("rflags", 64),
            memory,
        )

    def set_register(self, name: str, content: Expression) -> State:
        return replace(self, registers={**self.registers, name: z3.simplify(content)})

    def set_flags(self, **flags: Expression) -> State:
        return replace(self, flags={**self.flags, **flags})

    def assume(self, *conditions: Expression) -> State:
        return replace(self, conditions=(*self.conditions, *conditions))

    def relative(self, address: Expression) -> Expression:
        """Return an address relative to the crossing base."""
        return z3.simplify(address - BASE)


class Solver:
    """Solver for questions about a path; it counts them.

    Raises:
        TimeoutError: z3 did not decide within a minute.
    """

    def __init__(self) -> None:
        self.questions = 0
        self._solver = z3.Solver()
        self._solver.set("timeout", 60_000)
        self._solver.set("random_seed", 0)

    def possible(self, conditions: Iterable[Expression], *more: Expression) -> bool:
        """Return whether all of these can hold at once."""
        return self.example(conditions, *more) is not None

    def certain(self, conditions: Iterable[Expression], claim: Expression) -> bool:
        """Return whether the claim holds whenever the conditions do."""
        claim = z3.simplify(claim)
        if z3.is_true(claim):
            return True
        return not self.possible(conditions, z3.Not(claim))

    def example(self, conditions: Iterable[Expression], *more: Expression) -> Expression | None:
        """Return a model in which all of these hold, or None."""
        self.questions += 1
        self._solver.push()
        try:
            self._solver.add(*conditions, *more)
            answer = self._solver.check()
            if answer == z3.unknown:
                raise TimeoutError(f"z3 does not know: {self._solver.reason_unknown()}")
            return self._solver.model() if answer == z3.sat else None
        finally:
            self._solver.pop()

    def constant(self, conditions: tuple[Expression, ...], content: Expression) -> int | None:
        """Return the one signed value of `content` on this path, or None if there are several."""
        content = z3.simplify(content)
        if z3.is_bv_value(content):
            return int(content.as_signed_long())
        model = self.example(conditions)
        if model is None:
            return None
        guess = model.eval(content, model_completion=True)
        if self.certain(conditions, content == guess):
            return int(guess.as_signed_long())
        return None
