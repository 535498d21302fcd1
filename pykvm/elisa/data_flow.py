"""Values of an object's code, in registers and in memory, with the marks that they carry.

A `State` knows which value each general register holds, and each place in memory that was stored
to: a distance from a symbol, and a `Flow`. Places are told apart by symbols: the stack by its
distance from where it began, static memory by its address, everything else by the pointer that
leads there. Two pointers of different origin are taken for different places, and none of them for
one to the stack.

What instructions do to a state is in `pykvm.elisa.instruction_effects`.
"""

import functools
import itertools
from collections.abc import Hashable, Iterator
from typing import Final, NamedTuple

from pykvm.elisa.operations import REGISTERS, Immediate, Memory, Operand, Register

__all__ = [
    "ABSOLUTE",
    "ANY_LENGTH",
    "MASKED",
    "PLAIN",
    "STACK",
    "Flow",
    "State",
    "Value",
    "add_values",
    "join_values",
    "result_of",
    "symbol",
]

ANY_LENGTH: Final = 1 << 40
"""Length of a string operation of which nothing is known."""


class Flow(NamedTuple):
    """History of a value.

    Attributes:
        masked: derived from an index that a marked instruction has bounded.
        stale: so was what is in memory, but it was loaded with no barrier behind its store:
            speculatively it is whatever lay there before. The address of that store, or 0.
        reloaded: loaded from a place that the object had stored to, with no barrier in between. The
            address of that store, or 0.
    """

    masked: bool = False
    stale: int = 0
    reloaded: int = 0


PLAIN: Final = Flow()
MASKED: Final = Flow(masked=True)


class Value(NamedTuple):
    """Content of a register or a place: a distance from a symbol."""

    base: int
    offset: int
    flow: Flow = PLAIN


class _Stored(NamedTuple):
    value: Value
    store: int  # address of the store, or 0 if there was a barrier since


_Place = tuple[int, int, int]  # base, offset, size

ABSOLUTE: Final = 0
"""Symbol of numbers: constants, and addresses of static memory."""
STACK: Final = 1
"""Symbol of the stack pointer at the object's entry."""

_symbols: dict[Hashable, int] = {}
_numbers: Final = itertools.count(STACK + 1)  # so that no two threads take the same


def symbol(*origin: Hashable) -> int:
    """Return the symbol of values of one origin, the same for the same origin."""
    return _symbols.setdefault(origin, next(_numbers))


def _fenced(value: Value) -> Value:
    masked = value.flow.masked or value.flow.stale != 0
    return value._replace(flow=MASKED if masked else PLAIN)


def _first(one: int, other: int) -> int:
    """Return the lower of two addresses, as far as there are any."""
    return min(one, other) or one or other


def _both(one: Flow, other: Flow) -> Flow:
    if one == other:
        return one
    return Flow(
        one.masked or other.masked,
        _first(one.stale, other.stale),
        _first(one.reloaded, other.reloaded),
    )


def join_values(one: Value, other: Value, unlike: int) -> Value:
    """Return a value that is one or the other; `unlike` is its symbol if they differ."""
    flow = _both(one.flow, other.flow)
    if one[:2] == other[:2]:
        return one._replace(flow=flow)
    return Value(unlike, 0, flow)


_narrow: dict[int, int] = {}
"""Symbols of values that are known to fit into fewer than 8 bytes, and into how many."""


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _narrowed(value: Value, size: int) -> Value:
    """Return the value's lowest bytes, zero-extended."""
    if size >= 8 or (value.offset == 0 and _narrow.get(value.base, 8) <= size):
        return value._replace(offset=_signed(value.offset))
    if value.base == ABSOLUTE:
        return value._replace(offset=value.offset % (1 << 8 * size))
    base = symbol("low", value.base, value.offset, size)
    _narrow[base] = size
    return value._replace(base=base, offset=0)


def add_values(one: Value, other: Value) -> Value:
    """Return the sum of two values."""
    flow = _both(one.flow, other.flow)
    offset = _signed(one.offset + other.offset)
    if ABSOLUTE in (one.base, other.base):
        return Value(one.base or other.base, offset, flow)
    low, high = sorted((one.base, other.base))
    return Value(symbol("sum", low, high), offset, flow)


def _scaled(value: Value, factor: int) -> Value:
    """Return a multiple of a value."""
    offset = _signed(value.offset * factor)
    if factor == 1 or value.base == ABSOLUTE:
        return value._replace(offset=offset)
    return value._replace(base=symbol("scaled", value.base, factor), offset=offset)


def result_of(address: int, *values: Value, name: str = "") -> Value:
    """Return something computed of other values."""
    flow = functools.reduce(_both, (value.flow for value in values), PLAIN)
    return Value(symbol("result", address, name), 0, flow)


class State:
    """Values of registers and places at one point of the code."""

    def __init__(self) -> None:
        self.registers = {name: Value(symbol("entry", name), 0) for name in REGISTERS}
        self.registers["rsp"] = Value(STACK, 0)
        self.memory: dict[_Place, _Stored] = {}

    def clone(self) -> "State":
        """Return a copy."""
        other = State.__new__(State)
        other.registers = dict(self.registers)
        other.memory = dict(self.memory)
        return other

    def key(self) -> Hashable:
        """Return what two equal states have in common, and no others."""
        return tuple(self.registers.values()), frozenset(self.memory.items())

    def join(self, other: "State", where: Hashable) -> bool:
        """Add what holds in another state at the same point; return whether that was anything.

        Args:
            other: the other state.
            where: name of the point, for the symbols of values that differ.
        """
        changed = False
        for name, value in self.registers.items():
            if value is other.registers[name]:
                continue
            joined = join_values(value, other.registers[name], symbol("join", where, name))
            if joined != value:
                self.registers[name], changed = joined, True
        for place in self.memory.keys() | other.memory.keys():
            mine, theirs = self.memory.get(place), other.memory.get(place)
            if mine is theirs:
                continue
            one, two = mine or theirs, theirs or mine
            assert one
            assert two
            unlike = symbol("join", where, place)
            value = join_values(one.value, two.value, unlike)
            if mine is None or theirs is None:  # elsewhere it holds what was there before
                value = value._replace(base=unlike, offset=0)
            stored = _Stored(value, _first(one.store, two.store))
            if stored != mine:
                self.memory[place], changed = stored, True
        return changed

    def barrier(self) -> None:
        """Complete all loads and stores: what is loaded from now on is what was stored."""
        self.registers = {name: _fenced(value) for name, value in self.registers.items()}
        self.memory = {
            place: _Stored(_fenced(stored.value), 0) for place, stored in self.memory.items()
        }

    def leave_frame(self) -> None:
        """Forget the part of the stack that the stack pointer has left."""
        top = self.registers["rsp"]
        self.memory = {
            place: stored
            for place, stored in self.memory.items()
            if place[0] != top.base or place[1] >= top.offset
        }

    def load(self, base: int, offset: int, size: int) -> Value:
        """Return what a load gets from a place."""
        value = Value(symbol("load", base, offset, size), 0)
        flow = PLAIN
        for place, stored in self._overlapping(base, offset, size):
            if place == (base, offset, size):
                value = stored.value
            masked, stale, reloaded = stored.value.flow
            if stored.store and (masked or stale):
                masked, stale = False, stored.store
            flow = _both(flow, Flow(masked, stale, stored.store or reloaded))
        return value._replace(flow=flow)

    def store(self, base: int, offset: int, size: int, value: Value, address: int) -> None:
        """Put a value into a place; `address` is the store's own."""
        for place, old in list(self._overlapping(base, offset, size)):
            del self.memory[place]
            # What remains of it, on either side.
            for start, end in ((place[1], offset), (offset + size, place[1] + place[2])):
                if start < end:
                    rest = symbol("load", base, start, end - start)
                    self.memory[base, start, end - start] = _Stored(
                        old.value._replace(base=rest, offset=0), old.store
                    )
        self.memory[base, offset, size] = _Stored(value, address)

    def _overlapping(self, base: int, offset: int, size: int) -> Iterator[tuple[_Place, _Stored]]:
        for place, stored in self.memory.items():
            if place[0] == base and place[1] < offset + size and offset < place[1] + place[2]:
                yield place, stored

    def copy(self, source: Value, target: Value, length: int, address: int) -> None:
        """Copy `length` bytes from one place to another one."""
        moved = []
        for (base, offset, size), _ in self._overlapping(source.base, source.offset, length):
            start = max(offset, source.offset)
            end = min(offset + size, source.offset + length)
            moved.append((start - source.offset, end - start, self.load(base, start, end - start)))
        if length < ANY_LENGTH:
            unknown = Value(symbol("copy", address), 0)
            self.store(target.base, target.offset, length, unknown, address)
        for distance, size, value in moved:
            self.store(target.base, target.offset + distance, size, value, address)

    def address(self, operand: Memory) -> Value:
        """Return the address of a memory operand."""
        total = Value(ABSOLUTE, operand.displacement)
        if operand.base:
            total = add_values(total, self.registers[operand.base])
        if operand.scaled:
            total = add_values(total, _scaled(self.registers[operand.scaled], operand.scale))
        return total

    def read(self, operand: Operand, size: int) -> Value:
        """Return the value of an operand of so many bytes."""
        if isinstance(operand, Immediate):
            return _narrowed(Value(ABSOLUTE, operand.value), size)
        if isinstance(operand, Memory):
            place = self.address(operand)
            return self.load(place.base, place.offset, size)
        value = self.registers[operand.name]
        if operand.high:
            return Value(symbol("high", value.base, value.offset), 0, value.flow)
        return _narrowed(value, size)

    def write(self, operand: Operand, size: int, value: Value, address: int) -> None:
        """Change an operand; `address` is the instruction's own."""
        if isinstance(operand, Memory):
            place = self.address(operand)
            self.store(place.base, place.offset, size, value, address)
            return
        assert isinstance(operand, Register)
        if size < 4:  # the other bits stay
            value = result_of(address, self.registers[operand.name], value)
        self.registers[operand.name] = _narrowed(value, max(size, 4))

    def push(self, value: Value, address: int) -> None:
        """Push a value; `address` is the instruction's own."""
        top = add_values(self.registers["rsp"], Value(ABSOLUTE, -8))
        self.registers["rsp"] = top
        self.store(top.base, top.offset, 8, value, address)

    def pop(self) -> Value:
        """Pop a value, and return it."""
        top = self.registers["rsp"]
        self.registers["rsp"] = add_values(top, Value(ABSOLUTE, 8))
        return self.load(top.base, top.offset, 8)
