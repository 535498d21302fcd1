"""Check that an object's masked indices stay in registers (T39).

An index that `elisa_mask_nospec` or `elisa_index_nospec` has bounded (guest/include/elisa_nospec.h)
is in bounds on every path, mispredicted ones included. It is no longer so when the compiler puts it
into memory: a load may run ahead of the store before it (speculative store bypass, CVE-2018-3639),
and get what lay there earlier, which the guest may have chosen. A guest owns SPEC_CTRL, so nothing
forbids that inside an object.

The instructions that bound an index carry a DS prefix as a mark. From there `check_masked_indices`
follows it along every path of the linked code: through moves and arithmetic, into functions and
back, through the registers that a callee saves, and through the memory that `pykvm.elisa.data_flow`
tells apart. An address that was computed from what came back from memory is an error, unless an
LFENCE is between the store and the use. So is a mask or a size that came back from memory.

What this does not follow:

- pointers and other values that no mark has bounded, when the compiler puts those into memory;
- memory that two pointers of different origin lead to;
- an index that decides a branch, and nothing else.
"""

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Final

from pykvm.elisa import instruction_effects
from pykvm.elisa.data_flow import ABSOLUTE, State, Value
from pykvm.elisa.object_code import Instruction, branch_target, disassemble
from pykvm.elisa.operations import Operation
from pykvm.errors import PykvmError

__all__ = ["MaskedIndexError", "UnfollowedCodeError", "check_masked_indices"]

MAX_DEPTH: Final = 64  # of calls
MAX_STEPS: Final = 2_000_000

_END_OF_THUNK: Final = ["lea 0x8(%rsp),%rsp", "ret"]


class MaskedIndexError(PykvmError):
    """A masked index that is used after it was in memory."""


class UnfollowedCodeError(PykvmError):
    """Code with masked indices that cannot be followed to its end."""


def check_masked_indices(image: Path, name: str, entry: int) -> None:
    """Refuse an object in which a masked index is used after it was in memory.

    Args:
        image: the linked ELF file; `pykvm.elisa.object_code.check_instructions` has passed it.
        name: name of the object, for messages.
        entry: address of ``elisa_serve``.

    Raises:
        MaskedIndexError: a masked index, or what it was bounded by, comes back from memory.
        UnfollowedCodeError: calls nest too deep, or a function leaves its stack unbalanced.
        CompilerMissingError: there is no objdump, which comes with the compiler.
    """
    listing = list(disassemble(image))
    if any("ds" in instruction.prefixes for instruction in listing):
        _Check(listing, name).call(entry, State())


class _Check:
    def __init__(self, listing: Iterable[Instruction], name: str) -> None:
        self.name = name
        self.code = list(listing)
        self.place = {one.address: index for index, one in enumerate(self.code)}
        self.targets = {branch_target(one) for one in self.code if one.mnemonic.startswith("j")}
        self.operations: dict[int, Operation] = {}
        self.results: dict[tuple[int, Hashable], State | None] = {}
        self.active: list[int] = []
        self.steps = 0

    def call(self, entry: int, state: State) -> State | None:
        """Return the state when a function returns, or None if it never does."""
        key = (entry, state.key())
        if key not in self.results:
            if len(self.active) >= MAX_DEPTH:
                one = self.code[self.place[entry]]
                raise UnfollowedCodeError(
                    f"calls of {one.function} of {self.name} nest {MAX_DEPTH} deep, with masked "
                    "indices about",
                    "write the recursion as a loop",
                )
            self.active.append(entry)
            self.results[key] = self._function(entry, state)
            self.active.pop()
        return self.results[key]

    def _function(self, entry: int, state: State) -> State | None:
        known = {entry: state}
        waiting = [entry]
        end: State | None = None
        while waiting:
            address = waiting.pop()
            for target, arriving in self._block(address, known[address].clone()):
                if target is None:
                    self._check_stack(address, arriving, state)
                    if end is None:
                        end = arriving
                    else:
                        end.join(arriving, ("end", entry))
                    continue
                if target not in known:
                    known[target] = arriving.clone()
                elif not known[target].join(arriving, target):
                    continue
                if target not in waiting:
                    waiting.append(target)
        return end

    def _block(self, address: int, state: State) -> Iterator[tuple[int | None, State]]:
        """Yield where control goes from here, and the state there; None is the function's end."""
        for index in range(self.place[address], len(self.code)):
            one = self.code[index]
            self._count(one)
            if index > self.place[address] and one.address in self.targets:
                yield one.address, state
                return
            if one.mnemonic in ("ud2", "int3"):
                return
            if one.mnemonic == "ret":
                yield None, state
                return
            target = branch_target(one)
            if one.mnemonic.startswith("j"):
                yield target, state
                if one.mnemonic == "jmp":
                    return
            elif one.mnemonic == "call":
                assert target is not None
                if self._is_return(target):
                    yield None, state
                    return
                back = self._call(one.address, target, state)
                if back is None:
                    return
                state = back
            else:
                self._step(index, state)

    def _is_return(self, target: int) -> bool:
        """Return whether a call leads to the end of a return thunk, which drops its return address.

        GCC writes one for each return (-mfunction-return=thunk-inline).
        """
        index = self.place[target]
        return [one.text for one in self.code[index : index + 2]] == _END_OF_THUNK

    def _call(self, address: int, target: int, state: State) -> State | None:
        back = Value(ABSOLUTE, address)
        state.push(back, address)
        ended = self.call(target, state)
        if ended is None:
            return None
        after = ended.clone()
        after.pop()
        after.leave_frame()
        return after

    def _step(self, index: int, state: State) -> None:
        if index not in self.operations:
            following = self.code[index + 1].address if index + 1 < len(self.code) else 0
            try:
                self.operations[index] = instruction_effects.parse(self.code[index], following)
            except ValueError as error:
                raise UnfollowedCodeError(
                    f"{self.code[index].function} of {self.name} holds `{self.code[index].text}`, "
                    f"which nothing follows masked indices through: {error}",
                    "write it in plain C",
                ) from error
        operation = self.operations[index]
        for value in instruction_effects.addresses_of(operation, state):
            if stale := value.flow.stale:
                raise MaskedIndexError(
                    f"{self._where(index)} uses a masked index that was in memory: "
                    f"{self._store(stale)}",
                    "keep it in a register: make the function smaller, mask it again where it is "
                    f"used, or call elisa_barrier_nospec() after {stale:#x}",
                )
        bound = instruction_effects.bound_of(operation, state)
        if bound and (reloaded := bound.flow.reloaded):
            raise MaskedIndexError(
                f"{self._where(index)} bounds an index by a value that was in memory: "
                f"{self._store(reloaded)}",
                "use a constant, or read the size from the object's memory next to it, or call "
                f"elisa_barrier_nospec() after {reloaded:#x}",
            )
        instruction_effects.execute(operation, state)

    def _where(self, index: int) -> str:
        one = self.code[index]
        return f"{one.function} of {self.name}, at {one.address:#x} (`{one.text}`),"

    def _store(self, address: int) -> str:
        one = self.code[self.place[address]]
        return f"stored by {one.function} at {one.address:#x} (`{one.text}`)"

    def _check_stack(self, address: int, state: State, entered: State) -> None:
        if state.registers["rsp"][:2] != entered.registers["rsp"][:2]:
            raise UnfollowedCodeError(
                f"{self.code[self.place[address]].function} of {self.name} returns with another "
                "stack pointer than it was called with",
                "write it in plain C",
            )

    def _count(self, one: Instruction) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UnfollowedCodeError(
                f"{one.function} of {self.name} has too many paths to follow masked indices",
                "make the object smaller",
            )
