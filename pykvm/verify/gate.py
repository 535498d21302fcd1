"""The gate page: invariant I2, for each byte at which a guest may enter.

The proof covers *every* content of the general registers, RAX and RCX included, although VMFUNC
lets a guest in only with EAX = 0 and ECX = the slot of a gate. Therefore an indirect jump within
the page needs no case of its own: while the slot is zero, it is an entry like any other.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

import z3

from pykvm.elisa import crossing
from pykvm.sizes import PAGE_SIZE
from pykvm.verify.decode import Page
from pykvm.verify.explore import STOPS, End, Finding, Path, Symptom, explore, symbols_in
from pykvm.verify.state import (
    GENERAL,
    MAPPED,
    STATUS,
    Expression,
    Memory,
    Solver,
    State,
    StateRegion,
    value,
)

__all__ = ["GATE_REGIONS", "OFFICIAL", "SLOT", "GateProof", "gate_memory", "prove_gate"]

SLOT: Final = crossing.GATE_LIST_OFFSET + 8
"""Offset of the transient slot from the crossing base."""

OFFICIAL: Final = z3.BitVec("official", 64)
"""EPTP on the data page; any value except zero."""

GATE_REGIONS: Final = (
    StateRegion("code", crossing.GATE_OFFSET, PAGE_SIZE, executable=True),
    StateRegion("list", crossing.GATE_LIST_OFFSET, PAGE_SIZE, writable=True),
    StateRegion("data", crossing.GATE_DATA_OFFSET, PAGE_SIZE),
)
"""All that a gate context maps; `pykvm.verify.roots` checks this."""

_SLOTS: Final = 512
# The gate itself puts these there; the sub context overwrites them before the guest sees them.
_OVERWRITTEN: Final = frozenset({"rax", "rcx", "r8"})


def gate_memory() -> Memory:
    """Return the gate context's memory as a guest finds it: slot empty (I1), official EPTP set."""
    memory = Memory(GATE_REGIONS).with_word(SLOT, value(0))
    return memory.with_word(crossing.GATE_DATA_OFFSET, OFFICIAL)


@dataclass
class GateProof:
    """Result of following every path through the gate.

    Attributes:
        findings: what falls short; empty if I2 and the fence (T23) hold.
        paths: paths by the offset of their entry within the page.
        questions: number of questions that the solver answered.
    """

    findings: list[Finding] = field(default_factory=list)
    paths: dict[int, list[Path]] = field(default_factory=dict)
    questions: int = 0

    @property
    def holds(self) -> bool:
        return not self.findings and len(self.paths) == PAGE_SIZE

    @property
    def steps(self) -> int:
        """Number of instructions that were executed symbolically."""
        return sum(len(path.state.trace) for paths in self.paths.values() for path in paths)

    def classes(self) -> Counter[tuple[str, ...]]:
        """Return how many entry offsets share each set of possible ends."""
        return Counter(
            tuple(end.value for end in End if any(path.end is end for path in paths))
            for paths in self.paths.values()
        )

    def official(self) -> Path:
        """Return the path of an honest call: from the first byte to the sub context."""
        (found,) = [path for path in self.paths[0] if path.end is End.OFFICIAL]
        return found


def prove_gate(page: bytes) -> GateProof:
    """Follow every path from every byte of the built gate page."""
    code = Page(crossing.GATE_OFFSET, page)
    solver = Solver()
    proof = GateProof()
    start = State.arbitrary(crossing.GATE_OFFSET, gate_memory()).assume(OFFICIAL != 0)
    for at in range(len(page)):
        entry = crossing.GATE_OFFSET + at
        paths = explore(replace(start, pc=entry), code, solver, _vmfunc)
        proof.paths[at] = paths
        for path in paths:
            proof.findings += _judge(path, entry, solver)
    if not any(path.end is End.OFFICIAL for path in proof.paths.get(0, [])):
        note = "the first byte does not lead to the sub context"
        proof.findings.append(Finding(Symptom.ELSEWHERE, crossing.GATE_OFFSET, note))
    proof.questions = solver.questions
    return proof


def _slot(state: State) -> Expression:
    return state.memory.word(SLOT)


def _vmfunc(state: State, solver: Solver) -> list[Path]:
    """Return all outcomes of VMFUNC in a gate context (SDM vol. 3C 26.5.6).

    Slot 0 of the list holds the default EPTP, or zero while KVM has an event waiting. Slot 1 is the
    transient slot. Slots from 2 on hold gates of this vCPU, or zero.
    """
    function = z3.Extract(31, 0, state.registers["rax"])
    slot = z3.Extract(31, 0, state.registers["rcx"])
    switches = function == 0
    paths = []

    def way(
        end: End, *conditions: Expression, symptom: Symptom | None = None, note: str = ""
    ) -> bool:
        if not solver.possible(state.conditions, *conditions):
            return False
        paths.append(Path(state.assume(*conditions), end, symptom=symptom, note=note))
        return True

    # Another function, or a number beyond the list: #UD or an exit.
    way(End.EXIT, z3.Or(z3.Not(switches), z3.UGE(slot, _SLOTS)))
    way(End.DEFAULT, switches, slot == 0)
    transient = _slot(state)
    way(End.EXIT, switches, slot == 1, transient == 0)
    forged = z3.And(switches, slot == 1, transient != 0, transient != OFFICIAL)
    way(End.BROKEN, forged, symptom=Symptom.FORGED, note="at a VMFUNC")
    official = (switches, slot == 1, transient == OFFICIAL)
    if state.pc == crossing.SUB_ENTRY_OFFSET:
        way(End.OFFICIAL, *official)
    else:
        note = f"at offset {state.pc:#x}"
        way(End.BROKEN, *official, symptom=Symptom.ELSEWHERE, note=note)
    # A gate of this list. Its only executable page lies at the same offset from a multiple of 2 MiB
    # as this one, so no code follows it either.
    gates = (switches, z3.UGE(slot, 2), z3.ULT(slot, _SLOTS))
    inside = crossing.GATE_OFFSET <= state.pc < crossing.GATE_OFFSET + PAGE_SIZE
    way(End.REENTRY if inside else End.FETCH, *gates)
    return paths


def _judge(path: Path, entry: int, solver: Solver) -> list[Finding]:
    """Return what is wrong with a path from this entry."""
    state = path.state

    def found(symptom: Symptom, note: str, *conditions: Expression) -> Finding:
        return Finding(symptom, entry, note, _example(state, solver, *conditions))

    where = f"after {len(state.trace)} instructions, the last at {state.trace[-1]:#x}"
    if path.symptom is not None:
        return [found(path.symptom, f"{path.note}; {where}" if path.note else where)]
    findings = []
    slot = _slot(state)
    unwanted = {
        End.DEFAULT: (Symptom.OPEN, slot != 0),
        End.REENTRY: (Symptom.REENTERED, slot != 0),
        # The vCPU stops here; the slot may still hold what the gate itself stored.
        **dict.fromkeys(STOPS, (Symptom.FILLED, z3.And(slot != 0, slot != OFFICIAL))),
    }
    if path.end is End.CALL:
        findings.append(found(Symptom.ELSEWHERE, f"a call; {where}"))
    if path.end in unwanted:
        symptom, condition = unwanted[path.end]
        if solver.possible(state.conditions, condition):
            findings.append(found(symptom, where, condition))
    if path.end is End.OFFICIAL:
        if not solver.certain(state.conditions, z3.Not(state.flags["df"])):
            findings.append(found(Symptom.ENVIRONMENT, f"RFLAGS.DF may be set; {where}"))
        if not state.fenced:
            findings.append(found(Symptom.FENCE, where))
    if path.end not in STOPS:
        overwritten = _OVERWRITTEN if path.end is End.OFFICIAL else frozenset()
        findings += [
            found(Symptom.LEAK, f"{what}; {where}") for what in _leaks(state, solver, overwritten)
        ]
    return findings


def _leaks(state: State, solver: Solver, overwritten: frozenset[str]) -> list[str]:
    """Return the registers and flags that depend on the list or on the data page."""
    places = {name: state.registers[name] for name in GENERAL if name not in overwritten}
    places |= {flag: state.flags[flag] for flag in STATUS}
    leaks = [name for name, content in places.items() if _tells(state, solver, content)]
    return [*leaks, "x87 status"] if state.opaque else leaks


def _tells(state: State, solver: Solver, content: Expression) -> bool:
    """Return whether `content` can differ between two runs that differ only in secrets."""
    secrets = [one for one in symbols_in(content, *state.conditions) if _is_secret(str(one))]
    if not any(_is_secret(str(one)) for one in symbols_in(content)):
        return False
    others = [z3.Const(f"other {one}", one.sort()) for one in secrets]
    pairs = list(zip(secrets, others, strict=True))
    there = [z3.substitute(condition, *pairs) for condition in state.conditions]
    return solver.possible(state.conditions, *there, content != z3.substitute(content, *pairs))


def _is_secret(name: str) -> bool:
    return name == str(OFFICIAL) or name.startswith(f"{MAPPED}!")


def _example(state: State, solver: Solver, *conditions: Expression) -> str:
    """Return values at the entry that lead along this path, as text."""
    model = solver.example(state.conditions, *conditions)
    if model is None:
        return ""
    names = sorted(model.decls(), key=lambda one: str(one.name()))
    return ", ".join(f"{one.name()}={model[one]}" for one in names[:8])
