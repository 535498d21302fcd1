"""The sub entry page: from its first byte to the object's function, and from there to the guest.

`pykvm.verify.gate.prove_gate` shows that the page is entered at no other byte, and with RFLAGS.DF
clear. The object's code, which runs in between, is trusted: it keeps the ABI (callee-saved
registers, the caller's frame, DF), touches neither the EPTP list nor RFLAGS.AC, and returns.
"""

from dataclasses import dataclass, field, replace
from typing import Final

import z3

from pykvm.elisa import crossing
from pykvm.elisa.trusted_images import SubImage
from pykvm.sizes import PAGE_SIZE
from pykvm.verify.decode import Page, mnemonic_name
from pykvm.verify.explore import End, Finding, Path, Symptom, explore, symbols_in
from pykvm.verify.semantics import Event, step
from pykvm.verify.state import (
    BASE,
    STATUS,
    Expression,
    Memory,
    Solver,
    State,
    StateRegion,
    fresh,
    fresh_flag,
    truth,
    value,
)

__all__ = ["SLOT", "SubProof", "prove_sub", "sub_regions"]

SLOT: Final = crossing.LIST_OFFSET + 8
"""Offset of the transient slot in a sub context from the crossing base."""

_KEPT: Final = ("rbx", "rbp", "rsp", "r12", "r13", "r14", "r15")  # AMD64 ABI 3.2.1
_CHANGED: Final = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")
_CLEARED: Final = tuple(name for name in _CHANGED if name != "rdx")  # rdx holds the result
_OBJECT: Final = "object"


def sub_regions(image: SubImage) -> tuple[StateRegion, ...]:
    """Return the regions that the start and the end of a call may access.

    The object's shared memory is not among them: neither has any reason to access it.
    """
    parts = [
        StateRegion(
            f"image {part.offset:#x}", part.offset, len(part.data), part.writable, part.executable
        )
        for part in image.parts
    ]
    return (
        *parts,
        StateRegion("list", crossing.LIST_OFFSET, PAGE_SIZE, writable=True),
        StateRegion("environment", crossing.ENV_OFFSET, PAGE_SIZE),
        StateRegion("stack", crossing.STACK_OFFSET, crossing.STACK_SIZE, writable=True),
    )


@dataclass
class SubProof:
    """Result of following a call through the sub entry page.

    Attributes:
        findings: what falls short; empty if the claims hold.
        calls: paths from the first byte to the object's function.
        returns: paths from the function's return to the default context.
        questions: number of questions that the solver answered.
    """

    findings: list[Finding] = field(default_factory=list)
    calls: list[Path] = field(default_factory=list)
    returns: list[Path] = field(default_factory=list)
    questions: int = 0

    @property
    def holds(self) -> bool:
        return not self.findings and bool(self.calls) and bool(self.returns)

    @property
    def steps(self) -> int:
        """Number of instructions that were executed symbolically."""
        return sum(len(path.state.trace) for path in (*self.calls, *self.returns))


def prove_sub(image: SubImage, *, user: bool = False, clears: bool = False) -> SubProof:
    """Follow a call through the sub entry page of a built object.

    Args:
        image: the built object.
        user: whether it was built for callers in user mode. RFLAGS.AC then has to be clear while
            the object runs. For callers in kernel mode it has to be set, or SMAP would keep the
            object from its windows.
        clears: whether it was built with `Protection.BUFFER_CLEARING`. VERW then has to run with a
            null selector of the page's own, and nothing after it may touch memory.
    """
    (part,) = (part for part in image.parts if part.offset == crossing.SUB_ENTRY_OFFSET)
    page = Page(crossing.SUB_ENTRY_OFFSET, part.data)
    solver = Solver()
    proof = SubProof()
    memory = Memory(sub_regions(image)).with_word(SLOT, z3.BitVec("slot", 64))
    start = State.arbitrary(crossing.SUB_ENTRY_OFFSET, memory).set_flags(df=truth(False))
    judge = _Judge(proof, solver, image, user, page if clears else None)
    judge.first(start, page)
    proof.calls = explore(start, page, solver, _vmfunc)
    for path in proof.calls:
        judge.call(path)
        if path.end is End.CALL:
            back = explore(_after_object(path.state, solver), page, solver, _vmfunc)
            proof.returns += back
            for one in back:
                judge.back(one)
    proof.questions = solver.questions
    return proof


def _vmfunc(state: State, solver: Solver) -> list[Path]:
    """Return all outcomes of VMFUNC in a sub context: only the default context is intended."""
    registers = state.registers
    intended = z3.And(
        z3.Extract(31, 0, registers["rax"]) == 0, z3.Extract(31, 0, registers["rcx"]) == 0
    )
    if not solver.certain(state.conditions, intended):
        note = "VMFUNC with EAX or ECX that may not be 0"
        return [Path(state, End.BROKEN, symptom=Symptom.OPEN, note=note)]
    return [Path(state, End.DEFAULT)]


def _after_object(state: State, solver: Solver) -> State:
    """Return the state after the object's function has returned by its ABI."""
    registers = dict(state.registers)
    for name in _CHANGED:
        registers[name] = fresh(_OBJECT)
    registers["rsp"] = z3.simplify(registers["rsp"] + value(8))
    top = solver.constant(state.conditions, state.relative(registers["rsp"]))
    stack = range(crossing.STACK_OFFSET, crossing.STACK_OFFSET + crossing.STACK_SIZE)
    # Memory below the caller's frame may hold anything: the object used it.
    known = {
        at: byte
        for at, byte in state.memory.known.items()
        if at not in stack or (top is not None and at >= top)
    }
    flags = {**state.flags, **{flag: fresh_flag(_OBJECT) for flag in STATUS}, "df": truth(False)}
    return replace(
        state,
        registers=registers,
        flags=flags,
        memory=replace(state.memory, known=known),
        trace=(),
    )


class _Judge:
    def __init__(
        self, proof: SubProof, solver: Solver, image: SubImage, user: bool, clears: Page | None
    ) -> None:
        self.proof = proof
        self.solver = solver
        self.image = image
        self.user = user
        self.clears = clears  # the page that has to clear buffers

    def found(self, symptom: Symptom, note: str) -> None:
        self.proof.findings.append(Finding(symptom, crossing.SUB_ENTRY_OFFSET, note))

    def require(self, state: State, claim: Expression, symptom: Symptom, note: str) -> None:
        if not self.solver.certain(state.conditions, claim):
            self.found(symptom, note)

    def first(self, start: State, page: Page) -> None:
        """Check I1: the first instruction empties the slot."""
        instruction = page.at(start.pc)
        steps = step(start, instruction, page.code[: instruction.length], self.solver)
        closed = [
            one.event is Event.NEXT
            and self.solver.certain(one.state.conditions, one.state.memory.word(SLOT) == 0)
            for one in steps
        ]
        if not closed or not all(closed):
            self.found(Symptom.LATE, f"first comes {instruction.text}")

    def ended(self, path: Path, intended: End) -> bool:
        if path.symptom is not None:
            self.found(path.symptom, path.note)
        elif path.end is not intended:
            last = path.state.trace[-1] if path.state.trace else path.state.pc
            self.found(Symptom.ENVIRONMENT, f"{path.end.value} at {last:#x}")
        return path.symptom is None and path.end is intended

    def call(self, path: Path) -> None:
        """Check the state in which the object's function is called."""
        if not self.ended(path, End.CALL):
            return
        state = path.state
        registers, flags = state.registers, state.flags
        pointer = state.relative(registers["rsp"])
        function = self.image.symbols["elisa_serve"]
        return_address = state.memory.known.get(
            self.solver.constant(state.conditions, pointer) or -1
        )
        claims = [
            (state.memory.word(SLOT) == 0, "the slot is not zero"),
            (state.relative(path.target) == function, "another function is called"),
            (
                z3.And(*(registers[n] == z3.BitVec(n, 64) for n in ("rdi", "rsi", "rdx"))),
                "an argument is not the guest's",
            ),
            (registers["rcx"] == BASE + value(crossing.ENV_OFFSET), "rcx is not the environment"),
            (z3.URem(pointer, value(16)) == 8, "the stack is not aligned as the ABI asks"),
            (
                z3.And(
                    z3.UGT(pointer, crossing.STACK_OFFSET + crossing.STACK_SIZE // 2),
                    z3.ULT(pointer, crossing.STACK_OFFSET + crossing.STACK_SIZE),
                ),
                "the stack is not the context's own",
            ),
            (truth(return_address is not None), "there is no return address"),
            (z3.Not(flags["df"]), "RFLAGS.DF may be set"),
            (
                z3.Not(flags["ac"]) if self.user else flags["ac"],
                "RFLAGS.AC may be " + ("set" if self.user else "clear"),
            ),
        ]
        for claim, note in claims:
            self.require(state, claim, Symptom.ENVIRONMENT, f"at the call: {note}")

    def back(self, path: Path) -> None:
        """Check the state in which the guest goes on."""
        if not self.ended(path, End.DEFAULT):
            return
        state = path.state
        if state.pc != crossing.RETURN_OFFSET:
            self.found(Symptom.ELSEWHERE, f"the return goes on at {state.pc:#x}")
        self.require(state, state.memory.word(SLOT) == 0, Symptom.OPEN, "on the return")
        for name in _CLEARED:
            self.require(state, state.registers[name] == 0, Symptom.LEAK, f"{name} is not cleared")
        for name in _KEPT:
            same = state.registers[name] == z3.BitVec(name, 64)
            self.require(state, same, Symptom.ENVIRONMENT, f"{name} does not come back")
        for flag in STATUS:
            names = [str(one) for one in symbols_in(state.flags[flag])]
            if any(name.startswith(f"{_OBJECT}!") for name in names):
                self.found(Symptom.LEAK, f"{flag} is as the object left it")
        if self.clears is not None:
            self.cleared(state, self.clears)
        for flag in ("df", "ac"):
            clear = z3.Not(state.flags[flag])
            self.require(state, clear, Symptom.ENVIRONMENT, f"{flag} may be set on the return")

    def cleared(self, state: State, page: Page) -> None:
        """Check that the processor's buffers hold nothing of the object's."""
        if not state.buffers_clear:
            self.found(Symptom.LEAK, "memory is accessed after the buffers are cleared")
        for instruction in map(page.at, state.trace):
            if mnemonic_name(instruction) != "VERW":
                continue
            raw = instruction.raw
            at = raw.ip_rel_memory_address - page.offset if raw.is_ip_rel_memory_operand else -1
            if page.code[at : at + 2] != bytes(2) or at < 0:
                self.found(Symptom.LEAK, f"the selector of {instruction} may not be null")
