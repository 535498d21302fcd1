"""Operands of an instruction: registers and their parts, addresses, loads and stores."""

from dataclasses import replace
from typing import Final

import z3
from iced_x86 import MemorySizeExt, OpKind, Register

from pykvm.verify.decode import Instruction
from pykvm.verify.state import (
    BASE,
    GENERAL,
    MAPPED,
    SLOT_OFFSETS,
    Expression,
    Load,
    Solver,
    State,
    StateRegion,
    fresh,
    value,
)

__all__ = [
    "AccessFault",
    "StrayWrite",
    "UnknownInstruction",
    "address_of",
    "load",
    "operand_bits",
    "read",
    "store",
    "write",
]


class UnknownInstruction(Exception):
    """An instruction or an operand that the model does not know; the proof then fails."""


class AccessFault(Exception):
    """An access that cannot succeed in any state that the guest may have prepared.

    Nothing is mapped there, or it is a write to a read-only region.
    """


class StrayWrite(Exception):
    """A write that may change memory that the code must not change."""


def _parts() -> dict[int, tuple[str, int, int]]:
    """Return (register, lowest bit, bits) by iced's number of a register or of a part of one."""
    parts: dict[int, tuple[str, int, int]] = {}
    for name in GENERAL:
        upper = name.upper()
        if name[1:].isdigit():
            names = {64: upper, 32: f"{upper}D", 16: f"{upper}W", 8: f"{upper}L"}
        else:
            short = upper[1:]
            low = {"AX": "AL", "CX": "CL", "DX": "DL", "BX": "BL"}.get(short, f"{short}L")
            names = {64: upper, 32: f"E{short}", 16: short, 8: low}
        for bits, part in names.items():
            parts[getattr(Register, part)] = (name, 0, bits)
    for part, name in (("AH", "rax"), ("CH", "rcx"), ("DH", "rdx"), ("BH", "rbx")):
        parts[getattr(Register, part)] = (name, 8, 8)
    return parts


_PARTS: Final = _parts()
_BASES: Final = {Register.FS: "fs_base", Register.GS: "gs_base"}
_PREFIXES: Final = frozenset(b"\x66\x2e\x36\x3e\x26\x64\x65\xf0\xf2\xf3")
_IMMEDIATES: Final = frozenset(
    getattr(OpKind, name) for name in dir(OpKind) if name.startswith("IMMEDIATE")
)
_STRING_SOURCE: Final = frozenset({OpKind.MEMORY_SEG_RSI})
_STRING_TARGET: Final = frozenset({OpKind.MEMORY_ESRDI})


def _bits_of_register(register: int) -> int:
    if register not in _PARTS:
        raise UnknownInstruction("a register that is not general")
    return _PARTS[register][2]


def read_register(state: State, register: int) -> Expression:
    """Return the content of a general register or of a part of one.

    Raises:
        UnknownInstruction: it is another register.
    """
    if register not in _PARTS:
        raise UnknownInstruction("a register that is not general")
    name, low, bits = _PARTS[register]
    return z3.simplify(z3.Extract(low + bits - 1, low, state.registers[name]))


def write_register(state: State, register: int, content: Expression) -> State:
    """Write a general register or a part of one.

    Writing 32 bits clears the upper half, writing 8 or 16 keeps the rest (SDM vol. 1 3.4.1.1).

    Raises:
        UnknownInstruction: it is another register.
    """
    if register not in _PARTS:
        raise UnknownInstruction("a register that is not general")
    name, low, bits = _PARTS[register]
    old = state.registers[name]
    if bits == 32:
        content = z3.ZeroExt(32, content)
    elif bits < 32:
        parts = [z3.Extract(63, low + bits, old), content]
        if low:
            parts.append(z3.Extract(low - 1, 0, old))
        content = z3.Concat(*parts)
    return state.set_register(name, content)


def operand_bits(instruction: Instruction, number: int) -> int:
    """Return the width of an operand in bits; an immediate has that of operand 0."""
    raw = instruction.raw
    kind = raw.op_kind(number)
    if kind == OpKind.REGISTER:
        return _bits_of_register(raw.op_register(number))
    if kind in _IMMEDIATES:
        return operand_bits(instruction, 0)
    return int(MemorySizeExt.size(raw.memory_size)) * 8


def address_of(instruction: Instruction, state: State, code: bytes) -> Expression:
    """Return the linear address of the memory operand of an instruction, whose bytes are `code`.

    Raises:
        UnknownInstruction: the model does not know this kind of address.
    """
    raw = instruction.raw
    for number in range(raw.op_count):
        if raw.op_kind(number) in _STRING_SOURCE | _STRING_TARGET:
            raise UnknownInstruction("a string instruction's operand")
    narrow = _has_address_prefix(code)
    if raw.is_ip_rel_memory_operand:
        if narrow or raw.memory_base != Register.RIP:
            raise UnknownInstruction("an address relative to EIP")
        address = BASE + value(raw.ip_rel_memory_address)
    else:
        width = 32 if narrow else 64
        address = value(raw.memory_displacement & ((1 << width) - 1), width)
        for register, scale in ((raw.memory_base, 1), (raw.memory_index, raw.memory_index_scale)):
            if register == Register.NONE:
                continue
            if register in (Register.RIP, Register.EIP) or _bits_of_register(register) != width:
                raise UnknownInstruction("an address of mixed width")
            address = address + read_register(state, register) * value(scale, width)
        if narrow:
            address = z3.ZeroExt(32, address)
    if raw.memory_segment in _BASES:
        address = address + z3.BitVec(_BASES[raw.memory_segment], 64)
    return z3.simplify(address)


def _has_address_prefix(code: bytes) -> bool:
    for byte in code:
        if byte == 0x67:
            return True
        if byte not in _PREFIXES:
            return False
    return False


def _touches(relative: Expression, size: int, region: StateRegion) -> Expression:
    """Return whether a byte of an access lies in the region; addresses wrap around."""
    distance = relative - value((region.offset - size + 1) & ((1 << 64) - 1))
    return z3.ULT(distance, value(region.size + size - 1))


def load(state: State, solver: Solver, address: Expression, bits: int) -> tuple[State, Expression]:
    """Read memory; each read of bytes that the model does not follow gives a new symbol.

    Raises:
        AccessFault: the read cannot succeed.
    """
    size = bits // 8
    state = replace(state, buffers_clear=False)
    relative = state.relative(address)
    offset = solver.constant(state.conditions, relative)
    symbol = fresh(MAPPED, bits)
    read_from = Load(symbol, address, size, len(state.trace))
    if offset is None:
        touched = [_touches(relative, size, region) for region in state.memory.regions]
        if not solver.possible(state.conditions, z3.Or(touched)):
            raise AccessFault
        return replace(state, loads=(*state.loads, read_from)), symbol
    if state.memory.region(offset, size) is None:
        raise AccessFault
    known = [state.memory.known.get(offset + at) for at in range(size)]
    if any(byte is None for byte in known):
        state = replace(state, loads=(*state.loads, read_from))
    parts = [
        z3.Extract(8 * at + 7, 8 * at, symbol) if byte is None else byte
        for at, byte in enumerate(known)
    ]
    content = z3.Concat(*reversed(parts)) if size > 1 else parts[0]
    return state, z3.simplify(content)


def store(state: State, solver: Solver, address: Expression, content: Expression) -> State:
    """Write memory.

    Raises:
        AccessFault: the write cannot succeed.
        StrayWrite: it may go to an unknown place, or to a byte of the EPTP list outside the
            transient slot.
    """
    size = content.size() // 8
    relative = state.relative(address)
    offset = solver.constant(state.conditions, relative)
    writable = [region for region in state.memory.regions if region.writable]
    if offset is None:
        for region in writable:
            if solver.possible(state.conditions, _touches(relative, size, region)):
                raise StrayWrite(f"through a register, to any byte of the {region.name}")
        raise AccessFault
    found = state.memory.region(offset, size)
    if found is None or not found.writable:
        # A processor may have written the part before the boundary (SDM vol. 3A 6.5).
        for region in writable:
            if region.offset < offset + size and offset < region.end:
                raise StrayWrite(f"across the boundary of the {region.name}")
        raise AccessFault
    slot = SLOT_OFFSETS.get(found.offset)
    if slot is not None and not slot <= offset <= offset + size <= slot + 8:
        raise StrayWrite(f"to byte {offset - found.offset} of the EPTP list")
    return replace(state, memory=state.memory.with_bytes(offset, content), buffers_clear=False)


def read(
    instruction: Instruction, state: State, solver: Solver, number: int, code: bytes
) -> tuple[State, Expression]:
    """Read operand `number` of an instruction, whose bytes are `code`.

    Returns:
        The state after the read, and the operand's content.

    Raises:
        UnknownInstruction: the model does not know this kind of operand.
        AccessFault: the operand lies in memory, and the read cannot succeed.
    """
    raw = instruction.raw
    kind = raw.op_kind(number)
    if kind == OpKind.REGISTER:
        return state, read_register(state, raw.op_register(number))
    bits = operand_bits(instruction, number)
    if kind in _IMMEDIATES:
        return state, value(raw.immediate(number) & ((1 << bits) - 1), bits)
    if kind == OpKind.MEMORY:
        return load(state, solver, address_of(instruction, state, code), bits)
    raise UnknownInstruction("an operand of another kind")


def write(
    instruction: Instruction,
    state: State,
    solver: Solver,
    number: int,
    content: Expression,
    code: bytes,
) -> State:
    """Write operand `number` of an instruction, whose bytes are `code`.

    An address in memory is computed from the registers of `state`.

    Raises:
        UnknownInstruction: the model does not know this kind of operand.
        AccessFault: the operand lies in memory, and the write cannot succeed.
        StrayWrite: the write may change memory that the code must not change.
    """
    raw = instruction.raw
    kind = raw.op_kind(number)
    if kind == OpKind.REGISTER:
        return write_register(state, raw.op_register(number), content)
    if kind == OpKind.MEMORY:
        return store(state, solver, address_of(instruction, state, code), content)
    raise UnknownInstruction("an operand of another kind")
