"""Effects of an object's instructions on marked values, in registers and in memory.

A `State` knows which value each general register holds, and each place in memory that was stored
to: a distance from a symbol, and a `Flow`. Places are told apart by symbols: the stack by its
distance from where it began, static memory by its address, everything else by the pointer that
leads there. Two pointers of different origin are taken for different places, and none of them for
one to the stack.

Every mnemonic that `pykvm.elisa.object_code` allows has an effect here. Control flow is followed by
`pykvm.elisa.masked_indices`.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Final, NamedTuple, Self

from pykvm.elisa.object_code import Instruction

__all__ = ["ABSOLUTE", "STACK", "Flow", "Operation", "State", "Value", "symbol"]


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


_PLAIN: Final = Flow()
_MASKED: Final = Flow(masked=True)


class Value(NamedTuple):
    """Content of a register or a place: a distance from a symbol."""

    base: int
    offset: int
    flow: Flow = _PLAIN


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


# ---------------------------------------------------------------- operands


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
_REGISTERS: Final = tuple(dict.fromkeys(whole for whole, _ in _NAMES.values()))
_HIGH_BYTES: Final = frozenset({"ah", "bh", "ch", "dh"})
_WIDTHS: Final = {"b": 1, "w": 2, "l": 4, "q": 8}
_MEMORY: Final = re.compile(
    r"^(?:%[c-g]s:)?(-?(?:0x)?[0-9a-f]+)?(?:\((%\w+)?(?:,(%\w+)(?:,([1248]))?)?\))?$"
)
_ANY_LENGTH: Final = 1 << 40


class _Register(NamedTuple):
    name: str  # of all 64 bits
    size: int
    high: bool = False  # bits 8 to 15


class _Immediate(NamedTuple):
    value: int


class _Memory(NamedTuple):
    displacement: int
    base: str  # "" if there is none
    scaled: str
    scale: int


_Operand = _Register | _Immediate | _Memory


def _operand(text: str, following: int) -> _Operand:
    if text.startswith("$"):
        return _Immediate(int(text[1:], 0))
    if text.startswith("%") and text[1:] in _NAMES:
        name, size = _NAMES[text[1:]]
        return _Register(name, size, text[1:] in _HIGH_BYTES)
    found = _MEMORY.match(text)
    if not found:
        raise ValueError(f"an operand of unknown form: {text}")
    displacement, base, index, scale = found.groups(default="")
    distance = int(displacement or "0", 0 if "x" in displacement else 16)
    if base == "%rip":
        return _Memory(distance + following, "", "", 1)
    base, scaled = (_NAMES[one[1:]][0] if one[1:] in _NAMES else "" for one in (base, index))
    return _Memory(distance, base, scaled, int(scale or "1"))


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
    operands: tuple[_Operand, ...]
    size: int
    narrow: int
    prefixes: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, instruction: Instruction, following: int) -> Self:
        """Take an instruction apart.

        Args:
            instruction: any that objects may use, other than jumps and calls.
            following: address of the next one.

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
            mnemonic, size = _without_suffix(mnemonic)
            # A shift's count may be in %cl, and the operand of crc32 may be narrow.
            registers = [one.size for one in operands if isinstance(one, _Register)]
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

    def addresses(self, state: "State") -> Iterator[Value]:
        """Yield the values that decide which memory it accesses."""
        if self.mnemonic in ("lea", "nop"):
            return
        for operand in self.operands:
            if isinstance(operand, _Memory):
                names = (operand.base, operand.scaled)
                yield from (state.registers[name] for name in names if name)
                bit = self.operands[0]
                if self.mnemonic in _BIT_STRINGS and isinstance(bit, _Register):
                    yield state.registers[bit.name]
        if self.is_repeated():
            yield state.registers["rcx"]

    def bound(self, state: "State") -> Value | None:
        """Return the mask or the size by which a marked instruction bounds an index."""
        return state.read(self.operands[0], self.size) if self.is_mark() else None


_EXTENSION: Final = re.compile(r"mov[sz]([bwl])([wlq])")
_BIT_STRINGS: Final = ("bt", "bts", "btr", "btc")
_STRINGS: Final = ("movs", "stos", "lods", "cmps", "scas")


def _without_suffix(mnemonic: str) -> tuple[str, int]:
    """Return the mnemonic without its suffix, and the suffix's size or 0."""
    if mnemonic in _EFFECTS:
        return mnemonic, 0
    if mnemonic.startswith(("cmov", "set")):
        return ("cmov", 0) if mnemonic.startswith("cmov") else ("set", 1)
    if mnemonic.startswith("prefetch"):
        return "prefetch", 1
    if mnemonic[:-1] in _EFFECTS and mnemonic[-1] in _WIDTHS:
        return mnemonic[:-1], _WIDTHS[mnemonic[-1]]
    raise ValueError(f"an instruction whose effect is not known: {mnemonic}")


# ------------------------------------------------------------------- state


class State:
    """Values of registers and places at one point of the code."""

    def __init__(self) -> None:
        self.registers = {name: Value(symbol("entry", name), 0) for name in _REGISTERS}
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
            joined = _join(value, other.registers[name], symbol("join", where, name))
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
            value = _join(one.value, two.value, unlike)
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
        flow = _PLAIN
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
        if length < _ANY_LENGTH:
            unknown = Value(symbol("copy", address), 0)
            self.store(target.base, target.offset, length, unknown, address)
        for distance, size, value in moved:
            self.store(target.base, target.offset + distance, size, value, address)

    def address(self, operand: _Memory) -> Value:
        """Return the address of a memory operand."""
        total = Value(ABSOLUTE, operand.displacement)
        if operand.base:
            total = _sum(total, self.registers[operand.base])
        if operand.scaled:
            total = _sum(total, _scaled(self.registers[operand.scaled], operand.scale))
        return total

    def read(self, operand: _Operand, size: int) -> Value:
        """Return the value of an operand of so many bytes."""
        if isinstance(operand, _Immediate):
            return _narrowed(Value(ABSOLUTE, operand.value), size)
        if isinstance(operand, _Memory):
            place = self.address(operand)
            return self.load(place.base, place.offset, size)
        value = self.registers[operand.name]
        if operand.high:
            return Value(symbol("high", value.base, value.offset), 0, value.flow)
        return _narrowed(value, size)

    def write(self, operand: _Operand, size: int, value: Value, address: int) -> None:
        """Change an operand; `address` is the instruction's own."""
        if isinstance(operand, _Memory):
            place = self.address(operand)
            self.store(place.base, place.offset, size, value, address)
            return
        assert isinstance(operand, _Register)
        if size < 4:  # the other bits stay
            value = _result(address, self.registers[operand.name], value)
        self.registers[operand.name] = _narrowed(value, max(size, 4))

    def push(self, value: Value, address: int) -> None:
        """Push a value; `address` is the instruction's own."""
        top = _sum(self.registers["rsp"], Value(ABSOLUTE, -8))
        self.registers["rsp"] = top
        self.store(top.base, top.offset, 8, value, address)

    def pop(self) -> Value:
        """Pop a value, and return it."""
        top = self.registers["rsp"]
        self.registers["rsp"] = _sum(top, Value(ABSOLUTE, 8))
        return self.load(top.base, top.offset, 8)

    def execute(self, operation: Operation) -> None:
        """Change the state as an instruction does."""
        _EFFECTS[operation.mnemonic](self, operation)


def _fenced(value: Value) -> Value:
    masked = value.flow.masked or value.flow.stale != 0
    return value._replace(flow=_MASKED if masked else _PLAIN)


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


def _join(one: Value, other: Value, unlike: int) -> Value:
    flow = _both(one.flow, other.flow)
    if one[:2] == other[:2]:
        return one._replace(flow=flow)
    return Value(unlike, 0, flow)


# ------------------------------------------------------------------ values

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


def _sum(one: Value, other: Value) -> Value:
    flow = _both(one.flow, other.flow)
    offset = _signed(one.offset + other.offset)
    if ABSOLUTE in (one.base, other.base):
        return Value(one.base or other.base, offset, flow)
    low, high = sorted((one.base, other.base))
    return Value(symbol("sum", low, high), offset, flow)


def _scaled(value: Value, factor: int) -> Value:
    offset = _signed(value.offset * factor)
    if factor == 1 or value.base == ABSOLUTE:
        return value._replace(offset=offset)
    return value._replace(base=symbol("scaled", value.base, factor), offset=offset)


def _result(address: int, *values: Value, name: str = "") -> Value:
    """Return something computed of other values."""
    flow = functools.reduce(_both, (value.flow for value in values), _PLAIN)
    return Value(symbol("result", address, name), 0, flow)


# ----------------------------------------------------------------- effects


def _none(state: State, operation: Operation) -> None:
    """Change nothing but flags."""


def _mov(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    state.write(target, size, state.read(source, size), operation.address)


def _extend(state: State, operation: Operation) -> None:
    source, target = operation.operands
    value = state.read(source, operation.narrow)
    if "movs" in operation.text:
        value = value._replace(base=symbol("extended", value.base, value.offset), offset=0)
    state.write(target, operation.size, value, operation.address)


def _lea(state: State, operation: Operation) -> None:
    source, target = operation.operands
    assert isinstance(source, _Memory)
    state.write(target, operation.size, state.address(source), operation.address)


def _compute(state: State, operation: Operation) -> None:
    """Compute the last operand from all of them."""
    *sources, target = operation.operands
    size = operation.size
    values = [state.read(source, size) for source in sources]
    if not (operation.mnemonic == "imul" and len(sources) == 2):
        values.append(state.read(target, size))
    state.write(target, size, _result(operation.address, *values), operation.address)


def _add(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    total = _sum(state.read(source, size), state.read(target, size))
    state.write(target, size, total, operation.address)


def _subtract(state: State, operation: Operation) -> None:
    """SUB, and XOR and SBB where they make a constant or a mask."""
    source, target = operation.operands
    size = operation.size
    if source == target:
        zero = Value(ABSOLUTE, 0)
        mask = _result(operation.address)
        state.write(target, size, mask if operation.mnemonic == "sbb" else zero, operation.address)
        return
    value = state.read(source, size)
    if operation.mnemonic == "sub" and value.base == ABSOLUTE:
        total = _sum(value._replace(offset=-value.offset), state.read(target, size))
        state.write(target, size, total, operation.address)
    else:
        _compute(state, operation)


def _and(state: State, operation: Operation) -> None:
    _compute(state, operation)
    target = operation.operands[-1]
    if operation.is_mark() and isinstance(target, _Register):
        value = state.registers[target.name]
        state.registers[target.name] = value._replace(flow=_MASKED)


def _count(state: State, operation: Operation) -> None:
    (target,) = operation.operands
    one = Value(ABSOLUTE, 1 if operation.mnemonic == "inc" else -1)
    total = _sum(one, state.read(target, operation.size))
    state.write(target, operation.size, total, operation.address)


def _multiply(state: State, operation: Operation) -> None:
    """MUL, IMUL, DIV and IDIV of rdx and rax, and IMUL of other registers."""
    if len(operation.operands) > 1:
        _compute(state, operation)
        return
    value = state.read(operation.operands[0], operation.size)
    before = state.registers["rax"], state.registers["rdx"]
    for name in ("rax", "rdx"):
        state.registers[name] = _result(operation.address, value, *before, name=name)


def _count_bits(state: State, operation: Operation) -> None:
    source, target = operation.operands
    value = state.read(source, operation.size)
    state.write(target, operation.size, _result(operation.address, value), operation.address)


def _change_bit(state: State, operation: Operation) -> None:
    bit, target = operation.operands
    if not (isinstance(bit, _Register) and isinstance(target, _Memory)):  # any place, otherwise
        _compute(state, operation)


def _exchange(state: State, operation: Operation) -> None:
    one, other = operation.operands
    if isinstance(one, _Memory):
        one, other = other, one
    size = operation.size
    first, second = state.read(one, size), state.read(other, size)
    state.write(other, size, first, operation.address)  # memory first: its address may change
    state.write(one, size, second, operation.address)


def _exchange_and_add(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    old = state.read(target, size)
    total = _result(operation.address, old, state.read(source, size))
    state.write(target, size, total, operation.address)
    state.write(source, size, old, operation.address)


def _compare_and_exchange(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    old, rax = state.read(target, size), state.registers["rax"]
    new = _result(operation.address, old, state.read(source, size))
    state.write(target, size, new, operation.address)
    state.registers["rax"] = _result(operation.address, rax, old, name="rax")


def _compare_and_exchange_two(state: State, operation: Operation) -> None:
    (target,) = operation.operands
    assert isinstance(target, _Memory)
    size = 8 if operation.mnemonic == "cmpxchg16b" else 4
    place, address = state.address(target), operation.address
    for at, (expected, wanted) in enumerate((("rax", "rbx"), ("rdx", "rcx"))):
        old = state.load(place.base, place.offset + at * size, size)
        new = _result(address, old, state.registers[wanted], name=wanted)
        state.store(place.base, place.offset + at * size, size, new, address)
        before = state.registers[expected]
        state.registers[expected] = _result(address, before, old, name=expected)


def _push(state: State, operation: Operation) -> None:
    state.push(state.read(operation.operands[0], 8), operation.address)


def _pop(state: State, operation: Operation) -> None:
    state.write(operation.operands[0], 8, state.pop(), operation.address)


def _leave(state: State, operation: Operation) -> None:
    state.registers["rsp"] = state.registers["rbp"]
    state.registers["rbp"] = state.pop()


def _widen(state: State, operation: Operation) -> None:
    name = "rdx" if operation.mnemonic in ("cwtd", "cltd", "cqto") else "rax"
    state.registers[name] = _result(operation.address, state.registers["rax"])


def _move_if(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    either = _join(
        state.read(target, size), state.read(source, size), symbol("result", operation.address)
    )
    state.write(target, size, either, operation.address)


def _set(state: State, operation: Operation) -> None:
    state.write(operation.operands[0], 1, _result(operation.address), operation.address)


def _string(state: State, operation: Operation) -> None:
    size, address = operation.size, operation.address
    repeated = operation.is_repeated()
    source, target, count = (state.registers[name] for name in ("rsi", "rdi", "rcx"))
    length = size
    if repeated:
        length = count.offset * size if count.base == ABSOLUTE else _ANY_LENGTH
    kind = operation.mnemonic
    if kind == "movs":
        state.copy(source, target, length, address)
    elif kind == "stos":
        value = state.registers["rax"]
        if length < _ANY_LENGTH or value.flow != _PLAIN:
            state.store(target.base, target.offset, length, _result(address, value), address)
    elif kind == "lods":
        value = state.load(source.base, source.offset, size)
        state.write(_Register("rax", size), size, value, address)
    known = length < _ANY_LENGTH and not (repeated and kind in ("cmps", "scas"))
    for name, pointer in (("rsi", source), ("rdi", target)):
        if any(isinstance(one, _Memory) and one.base == name for one in operation.operands):
            moved = _sum(pointer, Value(ABSOLUTE, length))
            state.registers[name] = moved if known else _result(address, pointer, name=name)
    if repeated:
        left = _result(address, count, name="rcx")
        state.registers["rcx"] = left if kind in ("cmps", "scas") else Value(ABSOLUTE, 0)


def _lfence(state: State, operation: Operation) -> None:
    state.barrier()


_Effect = Callable[[State, Operation], None]
_EFFECTS: Final[dict[str, _Effect]] = {
    **dict.fromkeys(("mov", "movabs"), _mov),
    "movx": _extend,
    "lea": _lea,
    "add": _add,
    **dict.fromkeys(("sub", "xor", "sbb"), _subtract),
    "and": _and,
    **dict.fromkeys(("adc", "or", "neg", "not", "bswap", "crc32"), _compute),
    **dict.fromkeys(("shl", "sal", "shr", "sar", "rol", "ror", "rcl", "rcr"), _compute),
    **dict.fromkeys(("shld", "shrd", "bsf", "bsr"), _compute),
    **dict.fromkeys(("inc", "dec"), _count),
    **dict.fromkeys(("mul", "imul", "div", "idiv"), _multiply),
    **dict.fromkeys(("tzcnt", "lzcnt", "popcnt", "movbe"), _count_bits),
    **dict.fromkeys(("bts", "btr", "btc"), _change_bit),
    "xchg": _exchange,
    "xadd": _exchange_and_add,
    "cmpxchg": _compare_and_exchange,
    **dict.fromkeys(("cmpxchg8b", "cmpxchg16b"), _compare_and_exchange_two),
    "push": _push,
    "pop": _pop,
    "leave": _leave,
    **dict.fromkeys(("cbtw", "cwtl", "cltq", "cwtd", "cltd", "cqto"), _widen),
    "cmov": _move_if,
    "set": _set,
    **dict.fromkeys(_STRINGS, _string),
    "lfence": _lfence,
    **dict.fromkeys(("cmp", "test", "bt", "nop", "cld", "clc", "stc", "cmc"), _none),
    **dict.fromkeys(("mfence", "sfence", "pause", "prefetch", "endbr64"), _none),
}
