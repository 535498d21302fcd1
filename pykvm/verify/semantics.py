"""Semantics of single instructions on a symbolic state.

The model knows only the instructions in this module. Any other raises `UnknownInstruction`, which
the verifier counts as a failure: control, debug and segment registers, MSRs, descriptor tables,
ports, far transfers, SYSCALL and its like, vector instructions.

Any instruction may also fault, trap or exit (CPL, SMAP, alignment checks, TF, breakpoints); see
`pykvm.verify.explore`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

import z3
from iced_x86 import MemorySize, MemorySizeExt, OpKind, Register

from pykvm.verify import flags as arithmetic
from pykvm.verify.decode import Instruction, Kind, mnemonic_name
from pykvm.verify.operands import (
    AccessFault,
    StrayWrite,
    UnknownInstruction,
    address_of,
    load,
    operand_bits,
    read,
    store,
    write,
)
from pykvm.verify.state import (
    BASE,
    MAPPED,
    STATUS,
    Expression,
    Solver,
    State,
    fresh,
    fresh_flag,
    truth,
    value,
)

__all__ = ["Event", "Step", "step"]


class Event(Enum):
    """End of an instruction."""

    NEXT = auto()  # goes on with the next instruction
    TRAP = auto()  # INT3, INT1: an intended exception
    INVALID = auto()  # an opcode that raises #UD
    FETCH = auto()  # the instruction does not end in this page
    ACCESS = auto()  # an access to memory that cannot succeed
    BRANCH = auto()  # goes on at `Step.target`
    CALL = auto()  # the same, with the return address pushed
    VMFUNC = auto()
    STRAY = auto()  # a write to memory that must not be written; `Step.note` says which
    UNKNOWN = auto()  # the model does not know the instruction; see `Step.note`


@dataclass(frozen=True)
class Step:
    """One possible outcome of an instruction.

    Attributes:
        state: the state afterwards.
        event: how the instruction ends.
        target: linear address at which a branch or call goes on.
        note: what the model does not know, or where a stray write goes.
    """

    state: State
    event: Event = Event.NEXT
    target: Expression | None = None
    note: str = ""


def step(state: State, instruction: Instruction, code: bytes, solver: Solver) -> list[Step]:
    """Return all outcomes of an instruction, whose bytes are `code`, in this state."""
    state = replace(state, trace=(*state.trace, instruction.offset))
    match instruction.kind:
        case Kind.INVALID:
            return [Step(state, Event.INVALID)]
        case Kind.STRADDLES:
            return [Step(state, Event.FETCH)]
    execution = _Execution(instruction, code, solver)
    try:
        return execution.run(replace(state, pc=instruction.end))
    except AccessFault:
        return [Step(state, Event.ACCESS)]
    except StrayWrite as stray:
        return [Step(state, Event.STRAY, note=f"{instruction} writes {stray}")]
    except UnknownInstruction as unknown:
        return [Step(state, Event.UNKNOWN, note=f"{instruction}: {unknown}")]


_NOTHING: Final = frozenset(
    {"NOP", "PAUSE", "SFENCE", "ENDBR64", "PREFETCHT0", "PREFETCHT1", "PREFETCHT2", "PREFETCHNTA"}
)
_BINARY: Final = frozenset({"ADD", "ADC", "SUB", "SBB", "AND", "OR", "XOR", "CMP", "TEST"})
_ONE: Final = frozenset({"INC", "DEC", "NEG", "NOT"})
_SHIFTS: Final = frozenset({"SHL", "SAL", "SHR", "SAR", "ROL", "ROR"})
_X87_READS: Final = frozenset(
    {"FADD", "FMUL", "FCOM", "FCOMP", "FSUB", "FSUBR", "FDIV", "FDIVR", "FLD", "FILD"}
)
_STRINGS: Final = frozenset(
    name + size for name in ("SCAS", "LODS", "STOS", "MOVS") for size in "BWDQ"
)
_STATUS_BITS: Final = {"cf": 0, "pf": 2, "af": 4, "zf": 6, "sf": 7, "df": 10, "of": 11, "ac": 18}
_FREE_BITS: Final = 1 << 8 | 1 << 14 | 1 << 21  # TF, NT, ID: POPFQ sets them at any privilege
_GUARDED_BITS: Final = 1 << 9, 3 << 12  # IF, IOPL: set or ignored, by privilege
_VIRTUAL_BITS: Final = 3 << 19  # VIF, VIP: kept or cleared


class _Execution:
    def __init__(self, instruction: Instruction, code: bytes, solver: Solver) -> None:
        self.instruction = instruction
        self.code = code
        self.solver = solver
        self.raw = instruction.raw
        self.name = mnemonic_name(instruction)

    def run(self, state: State) -> list[Step]:
        name = self.name
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, state)
        for group, change in _GROUPS:
            if name in group:
                return [Step(change(self, state))]
        prefix, condition = _condition_of(name)
        if prefix == "J":
            return self._fork(state, arithmetic.CONDITIONS[condition](dict(state.flags)))
        if prefix == "CMOV":
            return [Step(self._conditional_move(state))]
        if prefix == "SET":
            holds = arithmetic.CONDITIONS[condition](dict(state.flags))
            return [Step(self._write(state, 0, z3.If(holds, value(1, 8), value(0, 8))))]
        raise UnknownInstruction("an instruction that the model does not know")

    # ---- operands ----

    def _read(self, state: State, number: int) -> tuple[State, Expression]:
        return read(self.instruction, state, self.solver, number, self.code)

    def _write(self, state: State, number: int, content: Expression) -> State:
        return write(self.instruction, state, self.solver, number, content, self.code)

    def _push(self, state: State, content: Expression) -> State:
        pointer = state.registers["rsp"] - value(8)
        return store(state, self.solver, pointer, content).set_register("rsp", pointer)

    def _pop(self, state: State) -> tuple[State, Expression]:
        pointer = state.registers["rsp"]
        state, content = load(state, self.solver, pointer, 64)
        return state.set_register("rsp", pointer + value(8)), content

    # ---- data ----

    def _binary(self, state: State) -> State:
        before = state
        state, left = self._read(state, 0)
        state, right = self._read(state, 1)
        carry = before.flags["cf"]
        match self.name:
            case "ADD":
                result, flags = arithmetic.add(left, right)
            case "ADC":
                result, flags = arithmetic.add(left, right, carry)
            case "SUB" | "CMP":
                result, flags = arithmetic.subtract(left, right)
            case "SBB":
                result, flags = arithmetic.subtract(left, right, carry)
            case "OR":
                result, flags = arithmetic.logic(left | right)
            case "XOR":
                same = self.raw.op_kind(0) == self.raw.op_kind(1) == OpKind.REGISTER and (
                    self.raw.op_register(0) == self.raw.op_register(1)
                )
                zero = value(0, left.size())
                result, flags = arithmetic.logic(zero if same else left ^ right)
            case _:
                result, flags = arithmetic.logic(left & right)
        if self.name not in ("CMP", "TEST"):
            state = self._write(state, 0, result)
        return state.set_flags(**flags)

    def _unary(self, state: State) -> State:
        carry = state.flags["cf"]
        state, content = self._read(state, 0)
        one = value(1, content.size())
        match self.name:
            case "NOT":
                return self._write(state, 0, ~content)
            case "NEG":
                result, flags = arithmetic.negate(content)
            case "INC":
                result, flags = arithmetic.add(content, one)
                flags["cf"] = carry
            case _:
                result, flags = arithmetic.subtract(content, one)
                flags["cf"] = carry
        return self._write(state, 0, result).set_flags(**flags)

    def _shift(self, state: State) -> State:
        if self.raw.op_kind(1) == OpKind.REGISTER:
            raise UnknownInstruction("a shift by CL")
        state, content = self._read(state, 0)
        bits = content.size()
        count = self.raw.immediate(1) & (63 if bits == 64 else 31)
        if not count:
            raise UnknownInstruction("a shift by nothing")
        amount = value(min(count, bits), bits)
        top, second = bits - 1, bits - 2
        match self.name:
            case "ROL" | "ROR":
                rotate = z3.RotateLeft if self.name == "ROL" else z3.RotateRight
                result = z3.simplify(rotate(content, count % bits))
                last = 0 if self.name == "ROL" else top
                flags = {"cf": z3.Extract(last, last, result) == 1}
            case "SHL" | "SAL":
                result, flags = arithmetic.logic(content << amount)
                last = bits - count
            case "SHR":
                result, flags = arithmetic.logic(z3.LShR(content, amount))
                last = count - 1
            case _:
                result, flags = arithmetic.logic(content >> amount)
                last = count - 1
        if self.name not in ("ROL", "ROR"):
            inside = 0 <= last <= top
            carry = z3.Extract(last, last, content) == 1 if inside else arithmetic.undefined()
            flags["cf"] = carry
        overflow = {
            "ROR": z3.Extract(top, top, result) != z3.Extract(second, second, result),
            "SHR": z3.Extract(top, top, content) == 1,
            "SAR": truth(False),
        }.get(self.name, (z3.Extract(top, top, result) == 1) != flags["cf"])
        flags["of"] = overflow if count == 1 else arithmetic.undefined()
        return self._write(state, 0, result).set_flags(**flags)

    def _x87(self, state: State) -> State:
        if self.raw.op_kind(0) != OpKind.MEMORY:
            raise UnknownInstruction("an x87 instruction without memory")
        state, _ = self._read(state, 0)
        return replace(state, opaque=True)

    def _conditional_move(self, state: State) -> State:
        condition = arithmetic.CONDITIONS[self.name[4:]](dict(state.flags))
        state, old = self._read(state, 0)
        state, new = self._read(state, 1)
        return self._write(state, 0, z3.If(condition, new, old))

    def _string(self, state: State) -> State:
        """Execute SCAS, LODS, STOS or MOVS.

        With REP it runs any number of rounds, so registers and flags may hold any value afterwards.
        """
        kind, bits = self.name[:4], {"B": 8, "W": 16, "D": 32, "Q": 64}[self.name[4]]
        if 0x67 in self.code[:-1] or self.raw.memory_segment in (Register.FS, Register.GS):
            raise UnknownInstruction("a string instruction with other addresses than RSI and RDI")
        repeated = self.raw.has_rep_prefix or self.raw.has_repne_prefix
        if repeated and kind in ("STOS", "MOVS"):
            if self.solver.certain(state.conditions, state.registers["rcx"] == 0):
                return state
            raise StrayWrite("any number of times, from RDI on")
        state = self._string_once(state, kind, bits)
        used = {"SCAS": ["rdi"], "LODS": ["rsi"], "STOS": ["rdi"], "MOVS": ["rsi", "rdi"]}[kind]
        distance = z3.If(state.flags["df"], value(-(bits // 8)), value(bits // 8))
        for name in used:
            state = state.set_register(name, state.registers[name] + distance)
        if repeated:
            for name in (*used, "rcx", *(["rax"] if kind == "LODS" else [])):
                state = state.set_register(name, fresh(MAPPED))
            state = state.set_flags(**{flag: fresh_flag(MAPPED) for flag in STATUS})
        return state

    def _string_once(self, state: State, kind: str, bits: int) -> State:
        """Execute one round, without the change of RSI and RDI."""
        rdi, rax = state.registers["rdi"], state.registers["rax"]
        content = z3.Extract(bits - 1, 0, rax)
        if kind == "SCAS":
            state, other = load(state, self.solver, rdi, bits)
            return state.set_flags(**arithmetic.subtract(content, other)[1])
        if kind in ("LODS", "MOVS"):
            state, content = load(state, self.solver, state.registers["rsi"], bits)
        if kind in ("STOS", "MOVS"):
            return store(state, self.solver, rdi, content)
        wide = z3.ZeroExt(64 - bits, content) if bits < 64 else content
        if bits < 32:
            wide = z3.Concat(z3.Extract(63, bits, rax), content)
        return state.set_register("rax", wide)

    def _mov(self, state: State) -> list[Step]:
        state, content = self._read(state, 1)
        return [Step(self._write(state, 0, content))]

    def _extend(self, state: State) -> list[Step]:
        bits = operand_bits(self.instruction, 0)
        state, content = self._read(state, 1)
        extend = z3.ZeroExt if self.name == "MOVZX" else z3.SignExt
        return [Step(self._write(state, 0, extend(bits - content.size(), content)))]

    def _verw(self, state: State) -> list[Step]:
        # ZF depends on a descriptor, unless the selector is null; here it may be anything.
        state, _ = self._read(state, 0)
        state = state.set_flags(zf=fresh_flag(MAPPED))
        return [Step(replace(state, buffers_clear=True))]

    def _lea(self, state: State) -> list[Step]:
        bits = operand_bits(self.instruction, 0)
        raw = self.raw
        if raw.memory_segment in (Register.FS, Register.GS):
            # LEA ignores the segment, address_of does not.
            raise UnknownInstruction("LEA with a segment")
        address = address_of(self.instruction, state, self.code)
        return [Step(self._write(state, 0, z3.simplify(z3.Extract(bits - 1, 0, address))))]

    def _xchg(self, state: State) -> list[Step]:
        state, left = self._read(state, 0)
        state, right = self._read(state, 1)
        # Memory first: its address is computed from the old registers.
        first, second = (0, 1) if self.raw.op_kind(0) == OpKind.MEMORY else (1, 0)
        contents = {0: right, 1: left}
        state = self._write(state, first, contents[first])
        return [Step(self._write(state, second, contents[second]))]

    def _push_operand(self, state: State) -> list[Step]:
        if self.raw.op_kind(0) == OpKind.MEMORY:
            bits = int(MemorySizeExt.size(self.raw.memory_size)) * 8
            state, content = load(
                state, self.solver, address_of(self.instruction, state, self.code), bits
            )
        elif self.raw.op_kind(0) == OpKind.REGISTER:
            state, content = self._read(state, 0)
        else:
            content = value(self.raw.immediate(0))
        if content.size() != 64:
            raise UnknownInstruction("PUSH of 16 bits")
        return [Step(self._push(state, content))]

    def _pop_operand(self, state: State) -> list[Step]:
        if self.raw.op_kind(0) != OpKind.REGISTER or operand_bits(self.instruction, 0) != 64:
            raise UnknownInstruction("POP into memory, or of 16 bits")
        state, content = self._pop(state)
        return [Step(self._write(state, 0, content))]

    def _leave(self, state: State) -> list[Step]:
        state = state.set_register("rsp", state.registers["rbp"])
        state, content = self._pop(state)
        return [Step(state.set_register("rbp", content))]

    def _push_flags(self, state: State) -> list[Step]:
        image = state.others & value(
            _FREE_BITS | _GUARDED_BITS[0] | _GUARDED_BITS[1] | _VIRTUAL_BITS
        )
        image = image | value(2)
        for name, bit in _STATUS_BITS.items():
            image = image | z3.If(state.flags[name], value(1 << bit), value(0))
        return [Step(self._push(state, z3.simplify(image)))]

    def _pop_flags(self, state: State) -> list[Step]:
        old = state.others
        state, image = self._pop(state)
        others = image & value(_FREE_BITS)
        for mask in _GUARDED_BITS:
            others = others | (z3.If(fresh_flag("privilege"), image, old) & value(mask))
        others = others | (z3.If(fresh_flag("virtual"), old, value(0)) & value(_VIRTUAL_BITS))
        flags = {
            name: z3.simplify(z3.Extract(bit, bit, image) == 1)
            for name, bit in _STATUS_BITS.items()
        }
        return [Step(replace(state.set_flags(**flags), others=z3.simplify(others)))]

    # ---- control ----

    def _target(self, state: State) -> tuple[State, Expression]:
        kind = self.raw.op_kind(0)
        if kind == OpKind.NEAR_BRANCH64:
            return state, z3.simplify(BASE + value(self.raw.near_branch_target))
        if kind == OpKind.REGISTER and operand_bits(self.instruction, 0) == 64:
            return self._read(state, 0)
        if kind == OpKind.MEMORY and self.raw.memory_size == MemorySize.QWORD_OFFSET:
            return self._read(state, 0)
        raise UnknownInstruction("a far transfer")

    def _fork(self, state: State, condition: Expression) -> list[Step]:
        _, target = self._target(state)
        steps = []
        if self.solver.possible(state.conditions, condition):
            steps.append(Step(state.assume(condition), Event.BRANCH, target))
        if self.solver.possible(state.conditions, z3.Not(condition)):
            steps.append(Step(state.assume(z3.Not(condition))))
        return steps

    def _jump(self, state: State) -> list[Step]:
        state, target = self._target(state)
        return [Step(state, Event.BRANCH, target)]

    def _loop(self, state: State) -> list[Step]:
        if 0x67 in self.code[:-1]:
            raise UnknownInstruction("a loop that counts in ECX")
        if self.name != "JRCXZ":
            state = state.set_register("rcx", state.registers["rcx"] - value(1))
        left = state.registers["rcx"] != 0
        condition = {
            "JRCXZ": z3.Not(left),
            "LOOP": left,
            "LOOPE": z3.And(left, state.flags["zf"]),
            "LOOPNE": z3.And(left, z3.Not(state.flags["zf"])),
        }[self.name]
        return self._fork(state, condition)

    def _call(self, state: State) -> list[Step]:
        state, target = self._target(state)
        state = self._push(state, z3.simplify(BASE + value(self.instruction.end)))
        return [Step(state, Event.CALL, target)]

    def _return(self, state: State) -> list[Step]:
        state, target = self._pop(state)
        if self.raw.op_count:
            more = value(self.raw.immediate(0) & 0xFFFF)
            state = state.set_register("rsp", state.registers["rsp"] + more)
        return [Step(state, Event.BRANCH, target)]


def _condition_of(name: str) -> tuple[str, str]:
    """Split a conditional mnemonic such as CMOVAE; return two empty strings for any other."""
    for prefix in ("CMOV", "SET", "J"):
        condition = name.removeprefix(prefix)
        if condition != name and condition in arithmetic.CONDITIONS:
            return prefix, condition
    return "", ""


def _set(**flags: bool) -> Callable[[_Execution, State], list[Step]]:
    changes = {name: truth(flag) for name, flag in flags.items()}
    return lambda _, state: [Step(state.set_flags(**changes))]


_GROUPS: Final[tuple[tuple[frozenset[str], Callable[[_Execution, State], State]], ...]] = (
    (_NOTHING, lambda _, state: state),
    (_BINARY, _Execution._binary),
    (_ONE, _Execution._unary),
    (_SHIFTS, _Execution._shift),
    (_X87_READS, _Execution._x87),
    (_STRINGS, _Execution._string),
)

_HANDLERS: Final[dict[str, Callable[[_Execution, State], list[Step]]]] = {
    "MOV": _Execution._mov,
    "MOVZX": _Execution._extend,
    "MOVSX": _Execution._extend,
    "MOVSXD": _Execution._extend,
    "LEA": _Execution._lea,
    "XCHG": _Execution._xchg,
    "PUSH": _Execution._push_operand,
    "POP": _Execution._pop_operand,
    "LEAVE": _Execution._leave,
    "PUSHFQ": _Execution._push_flags,
    "POPFQ": _Execution._pop_flags,
    "JMP": _Execution._jump,
    "CALL": _Execution._call,
    "RET": _Execution._return,
    "LOOP": _Execution._loop,
    "LOOPE": _Execution._loop,
    "LOOPNE": _Execution._loop,
    "JRCXZ": _Execution._loop,
    "CLC": _set(cf=False),
    "STC": _set(cf=True),
    "CLD": _set(df=False),
    "STD": _set(df=True),
    "CLAC": _set(ac=False),
    "STAC": _set(ac=True),
    "CMC": lambda _, state: [Step(state.set_flags(cf=z3.Not(state.flags["cf"])))],
    "VERW": _Execution._verw,
    "LFENCE": lambda _, state: [Step(replace(state, fenced=True))],
    "MFENCE": lambda _, state: [Step(state)],
    "INT1": lambda _, state: [Step(state, Event.TRAP)],
    "INT3": lambda _, state: [Step(state, Event.TRAP)],
    "VMFUNC": lambda _, state: [Step(state, Event.VMFUNC)],
    "UD0": lambda _, state: [Step(state, Event.INVALID)],
    "UD1": lambda _, state: [Step(state, Event.INVALID)],
    "UD2": lambda _, state: [Step(state, Event.INVALID)],
}
