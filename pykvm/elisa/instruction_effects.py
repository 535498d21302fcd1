"""Effects of an object's instructions on marked values.

Every mnemonic that `pykvm.elisa.object_code` allows has an effect here. Control flow is followed by
`pykvm.elisa.masked_indices`.
"""

from collections.abc import Callable, Iterator
from typing import Final

from pykvm.elisa.data_flow import (
    ABSOLUTE,
    ANY_LENGTH,
    MASKED,
    PLAIN,
    State,
    Value,
    add_values,
    join_values,
    result_of,
    symbol,
)
from pykvm.elisa.object_code import Instruction
from pykvm.elisa.operations import Memory, Operation, Register

__all__ = ["addresses_of", "bound_of", "execute", "parse"]

_BIT_STRINGS: Final = ("bt", "bts", "btr", "btc")
_STRINGS: Final = ("movs", "stos", "lods", "cmps", "scas")


def parse(instruction: Instruction, following: int) -> Operation:
    """Take an instruction apart; see `Operation.parse`.

    Raises:
        ValueError: its effect is not known.
    """
    return Operation.parse(instruction, following, _EFFECTS)


def execute(operation: Operation, state: State) -> None:
    """Change a state as an instruction does."""
    _EFFECTS[operation.mnemonic](state, operation)


def addresses_of(operation: Operation, state: State) -> Iterator[Value]:
    """Yield the values that decide which memory an instruction accesses."""
    if operation.mnemonic in ("lea", "nop"):
        return
    for operand in operation.operands:
        if isinstance(operand, Memory):
            names = (operand.base, operand.scaled)
            yield from (state.registers[name] for name in names if name)
            bit = operation.operands[0]
            if operation.mnemonic in _BIT_STRINGS and isinstance(bit, Register):
                yield state.registers[bit.name]
    if operation.is_repeated():
        yield state.registers["rcx"]


def bound_of(operation: Operation, state: State) -> Value | None:
    """Return the mask or the size by which a marked instruction bounds an index."""
    return state.read(operation.operands[0], operation.size) if operation.is_mark() else None


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
    assert isinstance(source, Memory)
    state.write(target, operation.size, state.address(source), operation.address)


def _compute(state: State, operation: Operation) -> None:
    """Compute the last operand from all of them."""
    *sources, target = operation.operands
    size = operation.size
    values = [state.read(source, size) for source in sources]
    if not (operation.mnemonic == "imul" and len(sources) == 2):
        values.append(state.read(target, size))
    state.write(target, size, result_of(operation.address, *values), operation.address)


def _add(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    total = add_values(state.read(source, size), state.read(target, size))
    state.write(target, size, total, operation.address)


def _subtract(state: State, operation: Operation) -> None:
    """SUB, and XOR and SBB where they make a constant or a mask."""
    source, target = operation.operands
    size = operation.size
    if source == target:
        zero = Value(ABSOLUTE, 0)
        mask = result_of(operation.address)
        state.write(target, size, mask if operation.mnemonic == "sbb" else zero, operation.address)
        return
    value = state.read(source, size)
    if operation.mnemonic == "sub" and value.base == ABSOLUTE:
        total = add_values(value._replace(offset=-value.offset), state.read(target, size))
        state.write(target, size, total, operation.address)
    else:
        _compute(state, operation)


def _and(state: State, operation: Operation) -> None:
    _compute(state, operation)
    target = operation.operands[-1]
    if operation.is_mark() and isinstance(target, Register):
        value = state.registers[target.name]
        state.registers[target.name] = value._replace(flow=MASKED)


def _count(state: State, operation: Operation) -> None:
    (target,) = operation.operands
    one = Value(ABSOLUTE, 1 if operation.mnemonic == "inc" else -1)
    total = add_values(one, state.read(target, operation.size))
    state.write(target, operation.size, total, operation.address)


def _multiply(state: State, operation: Operation) -> None:
    """MUL, IMUL, DIV and IDIV of rdx and rax, and IMUL of other registers."""
    if len(operation.operands) > 1:
        _compute(state, operation)
        return
    value = state.read(operation.operands[0], operation.size)
    before = state.registers["rax"], state.registers["rdx"]
    for name in ("rax", "rdx"):
        state.registers[name] = result_of(operation.address, value, *before, name=name)


def _count_bits(state: State, operation: Operation) -> None:
    source, target = operation.operands
    value = state.read(source, operation.size)
    state.write(target, operation.size, result_of(operation.address, value), operation.address)


def _change_bit(state: State, operation: Operation) -> None:
    bit, target = operation.operands
    if not (isinstance(bit, Register) and isinstance(target, Memory)):  # any place, otherwise
        _compute(state, operation)


def _exchange(state: State, operation: Operation) -> None:
    one, other = operation.operands
    if isinstance(one, Memory):
        one, other = other, one
    size = operation.size
    first, second = state.read(one, size), state.read(other, size)
    state.write(other, size, first, operation.address)  # memory first: its address may change
    state.write(one, size, second, operation.address)


def _exchange_and_add(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    old = state.read(target, size)
    total = result_of(operation.address, old, state.read(source, size))
    state.write(target, size, total, operation.address)
    state.write(source, size, old, operation.address)


def _compare_and_exchange(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    old, rax = state.read(target, size), state.registers["rax"]
    new = result_of(operation.address, old, state.read(source, size))
    state.write(target, size, new, operation.address)
    state.registers["rax"] = result_of(operation.address, rax, old, name="rax")


def _compare_and_exchange_two(state: State, operation: Operation) -> None:
    (target,) = operation.operands
    assert isinstance(target, Memory)
    size = 8 if operation.mnemonic == "cmpxchg16b" else 4
    place, address = state.address(target), operation.address
    for at, (expected, wanted) in enumerate((("rax", "rbx"), ("rdx", "rcx"))):
        old = state.load(place.base, place.offset + at * size, size)
        new = result_of(address, old, state.registers[wanted], name=wanted)
        state.store(place.base, place.offset + at * size, size, new, address)
        before = state.registers[expected]
        state.registers[expected] = result_of(address, before, old, name=expected)


def _push(state: State, operation: Operation) -> None:
    state.push(state.read(operation.operands[0], 8), operation.address)


def _pop(state: State, operation: Operation) -> None:
    state.write(operation.operands[0], 8, state.pop(), operation.address)


def _leave(state: State, operation: Operation) -> None:
    state.registers["rsp"] = state.registers["rbp"]
    state.registers["rbp"] = state.pop()


def _widen(state: State, operation: Operation) -> None:
    name = "rdx" if operation.mnemonic in ("cwtd", "cltd", "cqto") else "rax"
    state.registers[name] = result_of(operation.address, state.registers["rax"])


def _move_if(state: State, operation: Operation) -> None:
    source, target = operation.operands
    size = operation.size
    either = join_values(
        state.read(target, size), state.read(source, size), symbol("result", operation.address)
    )
    state.write(target, size, either, operation.address)


def _set(state: State, operation: Operation) -> None:
    state.write(operation.operands[0], 1, result_of(operation.address), operation.address)


def _string(state: State, operation: Operation) -> None:
    size, address = operation.size, operation.address
    repeated = operation.is_repeated()
    source, target, count = (state.registers[name] for name in ("rsi", "rdi", "rcx"))
    length = size
    if repeated:
        length = count.offset * size if count.base == ABSOLUTE else ANY_LENGTH
    kind = operation.mnemonic
    if kind == "movs":
        state.copy(source, target, length, address)
    elif kind == "stos":
        value = state.registers["rax"]
        if length < ANY_LENGTH or value.flow != PLAIN:
            state.store(target.base, target.offset, length, result_of(address, value), address)
    elif kind == "lods":
        value = state.load(source.base, source.offset, size)
        state.write(Register("rax", size), size, value, address)
    known = length < ANY_LENGTH and not (repeated and kind in ("cmps", "scas"))
    for name, pointer in (("rsi", source), ("rdi", target)):
        if any(isinstance(one, Memory) and one.base == name for one in operation.operands):
            moved = add_values(pointer, Value(ABSOLUTE, length))
            state.registers[name] = moved if known else result_of(address, pointer, name=name)
    if repeated:
        left = result_of(address, count, name="rcx")
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
