"""All paths from a state, until they leave the page.

Only the branches of the page's own code are followed. Any instruction may also be interrupted
before or after it: by a fault (CPL, SMAP, an alignment check, a segment's limit), a trap (TF, a
breakpoint) or an exit to KVM. Each of these either stops the vCPU, because no descriptor table can
be read in these contexts (I8), or lets it continue later in the same state. They add no other end.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import z3

from pykvm.verify.decode import Page
from pykvm.verify.semantics import Event, Step, step
from pykvm.verify.state import Expression, Solver, State

__all__ = ["STOPS", "End", "Finding", "Path", "Rule", "Symptom", "explore", "symbols_in"]

_LONGEST_PATH: Final = 48  # instructions; a branch after as many ends the path as an entry


class End(Enum):
    """End of a path, as the page's code intends it."""

    OFFICIAL = "official sub entry"
    DEFAULT = "default context"
    REENTRY = "entry again"
    BREAKPOINT = "trap"
    INVALID = "invalid opcode"
    FETCH = "fetch outside"
    ACCESS = "access that faults"
    EXIT = "VMFUNC exits"
    CALL = "object's function"
    BROKEN = "broken"


STOPS: Final = frozenset({End.BREAKPOINT, End.INVALID, End.FETCH, End.ACCESS, End.EXIT})
"""Ends at which the vCPU cannot continue without the VMM."""


class Symptom(Enum):
    """Fault of a path."""

    UNKNOWN = "an instruction that the model does not know"
    STRAY = "a write to something else than the transient slot"
    FORGED = "an EPTP that is not the official one becomes active"
    ELSEWHERE = "the sub context is entered at another address"
    OPEN = "the default context is reached with the slot filled"
    FILLED = "a stop by intention leaves the slot filled"
    REENTERED = "the gate is entered again with the slot filled"
    LATE = "the sub context runs something before it clears the slot"
    ENVIRONMENT = "the object's function is called in another environment"
    LEAK = "something of the host's or the object's is left to the guest"
    FENCE = "no fence between the check and the sub context"
    BYTES = "the bytes of VMFUNC where they do not belong"
    PREFIX = "a byte that processors to come may read as a prefix"
    ENDLESS = "no end"


@dataclass(frozen=True)
class Finding:
    """A path that falls short.

    Attributes:
        symptom: what is wrong.
        entry: offset of the entry from the crossing base.
        note: place, in words.
        example: registers at the entry that lead there, as text.
    """

    symptom: Symptom
    entry: int
    note: str
    example: str = ""

    def __str__(self) -> str:
        example = f" with {self.example}" if self.example else ""
        return f"entry {self.entry:#x}: {self.symptom.value} ({self.note}){example}"


@dataclass(frozen=True)
class Path:
    """A path through the page.

    Attributes:
        state: the state at its end.
        end: how it ends.
        target: where a path that ends as REENTRY or CALL goes on.
        symptom: what is wrong with it, if anything.
        note: place, in words.
    """

    state: State
    end: End
    target: Expression | None = None
    symptom: Symptom | None = None
    note: str = ""


Rule = Callable[[State, Solver], list[Path]]
"""Semantics of VMFUNC in a context: returns all paths that it ends."""


def explore(start: State, page: Page, solver: Solver, vmfunc: Rule) -> list[Path]:
    """Follow every path from `start`.

    Args:
        start: the state at the entry.
        page: the code; a path ends where it leaves the page.
        solver: decides which branches are possible.
        vmfunc: function that returns the outcomes of VMFUNC in a state.
    """
    paths: list[Path] = []
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if state.pc not in page:
            paths.append(Path(state, End.FETCH))
            continue
        if len(state.trace) > 2 * _LONGEST_PATH:
            paths.append(Path(state, End.BROKEN, symptom=Symptom.ENDLESS, note="no branch ends it"))
            continue
        instruction = page.at(state.pc)
        at = state.pc - page.offset
        code = page.code[at : at + instruction.length]
        for one in step(state, instruction, code, solver):
            if one.event is Event.NEXT:
                waiting.append(one.state)
            elif one.event is Event.VMFUNC:
                paths += vmfunc(one.state, solver)
            elif one.event in (Event.BRANCH, Event.CALL):
                gone = _branch(one, page, solver)
                if isinstance(gone, State):
                    waiting.append(gone)
                else:
                    paths.append(gone)
            else:
                paths.append(_stopped(one))
    return paths


_EVENT_ENDS: Final = {
    Event.TRAP: End.BREAKPOINT,
    Event.INVALID: End.INVALID,
    Event.FETCH: End.FETCH,
    Event.ACCESS: End.ACCESS,
}


def _stopped(one: Step) -> Path:
    if one.event in _EVENT_ENDS:
        return Path(one.state, _EVENT_ENDS[one.event])
    symptom = Symptom.STRAY if one.event is Event.STRAY else Symptom.UNKNOWN
    return Path(one.state, End.BROKEN, symptom=symptom, note=one.note)


def _branch(one: Step, page: Page, solver: Solver) -> State | Path:
    relative = one.state.relative(one.target)
    offset = solver.constant(one.state.conditions, relative)
    if offset is None:
        inside = z3.ULT(relative - page.offset, len(page.code))
        if not solver.possible(one.state.conditions, inside):
            return Path(one.state, End.FETCH)
    elif offset not in page:
        if one.event is Event.CALL:
            return Path(one.state, End.CALL, one.target)
        return Path(one.state, End.FETCH)
    elif len(one.state.trace) < _LONGEST_PATH:
        return replace(one.state, pc=offset)
    return Path(one.state, End.REENTRY, one.target)


def symbols_in(*expressions: Expression) -> list[Expression]:
    """Return all symbols in these expressions, each once."""
    found: dict[int, Expression] = {}
    seen: set[int] = set()
    waiting = [z3.simplify(expression) for expression in expressions]
    while waiting:
        one = waiting.pop()
        if one.get_id() in seen:
            continue
        seen.add(one.get_id())
        if z3.is_const(one) and one.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            found[one.get_id()] = one
        waiting.extend(one.children())
    return list(found.values())
