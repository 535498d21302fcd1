"""Random states run in the emulator, and compared with the symbolic paths.

The gate is run from every byte. Instructions, end, registers, flags and slot are compared with the
one path whose conditions the state meets. The sub entry page is run as a whole, with a function of
the object that leaves random values wherever the ABI allows it.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pykvm.elisa import crossing
from pykvm.elisa.object_code import VMFUNC
from pykvm.elisa.trusted_images import SubImage
from pykvm.paging.entries import EPTP
from pykvm.sizes import PAGE_SIZE
from pykvm.verify import sub
from pykvm.verify.emulator import STATUS_BITS, Emulator, Run, Stop
from pykvm.verify.evaluate import Evaluated, compiled
from pykvm.verify.explore import End, Path
from pykvm.verify.gate import GATE_REGIONS, SLOT, GateProof
from pykvm.verify.roots import BASES
from pykvm.verify.state import FLAGS, GENERAL, STATUS

__all__ = ["Comparison", "check_gate", "check_sub"]

_INT3: Final = 0xCC
_LOCK: Final = 0xF0
_OPEN = "open"  # the symbolic run does not determine how it continues
_PAGE_END: Final = crossing.GATE_OFFSET + PAGE_SIZE
_LONGEST: Final = 64  # instructions of one run
_STATUS_MASK: Final = sum(1 << STATUS_BITS[flag] for flag in STATUS)
_STOPS: Final = {
    End.BREAKPOINT: Stop.BREAKPOINT,
    End.INVALID: Stop.INVALID,
    End.FETCH: Stop.FETCH,
    End.ACCESS: Stop.ACCESS,
}


@dataclass
class Comparison:
    """Result of a comparison.

    Attributes:
        seed: seed of the random states.
        states: number of states that were run.
        instructions: number of instructions in all runs.
        ends: number of runs by their end.
        disagreements: differences from the symbolic paths, line by line.
    """

    seed: int
    states: int = 0
    instructions: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.states > 0 and not self.disagreements

    def count(self, run: Run, end: str) -> None:
        self.states += 1
        self.instructions += len(run.trace)
        self.ends[end] = self.ends.get(end, 0) + 1


@dataclass(frozen=True)
class _Prediction:
    """Expected result of a run; registers are None where the symbolic run leaves them open."""

    trace: list[int]
    stop: str
    end: str
    registers: Mapping[str, int | None]
    slot: int | None


class _NoPathError(Exception):
    """No symbolic path, or more than one, fits a state."""


class _Values:
    """Values of symbols at an entry."""

    def __init__(self, base: int, official: int, registers: Mapping[str, int]) -> None:
        flags = registers["rflags"]
        self._known = {
            **registers,
            **{name: flags >> STATUS_BITS[name] & 1 for name in FLAGS},
            **{"block": base >> 21, "official": official, "fs_base": 0, "gs_base": 0},
        }

    def learn(self, name: str, word: int) -> None:
        self._known[name] = word

    def of(self, function: tuple[Evaluated, frozenset[str]]) -> int | None:
        """Return the function's value, or None if one of its symbols is still open."""
        evaluate, names = function
        return evaluate(self._known) if names <= self._known.keys() else None


class _CompiledPath:
    """A path whose expressions are compiled."""

    def __init__(self, path: Path) -> None:
        state = path.state
        self.end = path.end
        self.trace = list(state.trace)
        self.target = None if path.target is None else compiled(path.target)
        self.conditions = [compiled(condition) for condition in state.conditions]
        self.loads = [
            (str(one.symbol), compiled(one.address), one.size, one.number) for one in state.loads
        ]
        self.registers = {name: compiled(state.registers[name]) for name in GENERAL}
        self.flags = {name: compiled(state.flags[name]) for name in FLAGS}
        self.others = compiled(state.others)
        self.slot = compiled(state.memory.word(SLOT))


class _Oracle:
    """Oracle that predicts runs in one memory from the symbolic paths."""

    def __init__(
        self, paths: Mapping[int, list[_CompiledPath]], emulator: Emulator, official: int
    ) -> None:
        self.paths = paths
        self.emulator = emulator
        self.official = official

    def predict(self, entry: int, registers: Mapping[str, int]) -> _Prediction:
        """Predict a run; call it before the emulator runs, because it reads memory."""
        trace: list[int] = []
        while True:
            path, values, faulted = self._path(entry, registers)
            if faulted is not None:
                trace += path.trace[:faulted]
                return _Prediction(trace, Stop.ACCESS, End.ACCESS.value, {}, None)
            trace += path.trace
            if len(trace) >= _LONGEST:
                return _Prediction(trace[:_LONGEST], Stop.RUNNING, "no end yet", {}, None)
            after = self._registers(path, values)
            if path.end is not End.REENTRY:
                last = self.emulator.read(trace[-1], len(VMFUNC))
                stop = Stop.VMFUNC if last == VMFUNC else _STOPS.get(path.end, Stop.VMFUNC)
                return _Prediction(trace, stop, path.end.value, after, values.of(path.slot))
            target = None if path.target is None else values.of(path.target)
            if target is None or any(content is None for content in after.values()):
                # Flags are undefined, and what follows may depend on them.
                return _Prediction(trace, _OPEN, path.end.value, {}, None)
            entry = (target - self.emulator.base + (1 << 63)) % (1 << 64) - (1 << 63)
            if not 0 <= entry - crossing.GATE_OFFSET < PAGE_SIZE:
                return _Prediction(trace, Stop.FETCH, End.FETCH.value, after, 0)
            registers = {name: content or 0 for name, content in after.items()}

    def _path(
        self, entry: int, registers: Mapping[str, int]
    ) -> tuple[_CompiledPath, _Values, int | None]:
        """Return the path of a state, and the instruction whose load faults, if one does."""
        fitting = []
        for path in self.paths[entry - crossing.GATE_OFFSET]:
            values = _Values(self.emulator.base, self.official, registers)
            faulted = self._load(path, values)
            verdicts = [values.of(condition) for condition in path.conditions]
            if 0 in verdicts:
                continue
            if None in verdicts and faulted is None:
                raise _NoPathError("a condition is left open")
            fitting.append((path, values, faulted))
        if any(faulted is not None for _, _, faulted in fitting):
            return fitting[0]
        if len(fitting) != 1:
            raise _NoPathError(f"{len(fitting)} paths fit")
        return fitting[0]

    def _load(self, path: _CompiledPath, values: _Values) -> int | None:
        for name, address_of, size, number in path.loads:
            address = values.of(address_of)
            content = None
            if address is not None:
                content = self.emulator.read(address - self.emulator.base, size)
            if content is None:
                return number
            values.learn(name, int.from_bytes(content, "little"))
        return None

    def _registers(self, path: _CompiledPath, values: _Values) -> dict[str, int | None]:
        """Return the general registers, and ``rflags`` unless a flag is undefined."""
        after = {name: values.of(function) for name, function in path.registers.items()}
        rflags = values.of(path.others)
        for name, function in path.flags.items():
            flag = values.of(function)
            bit = 1 << STATUS_BITS[name]
            if rflags is None or flag is None:
                rflags = None
            else:
                rflags = rflags | bit if flag else rflags & ~bit
        return {**after, "rflags": rflags}


class _States:
    """Generator of random states, rich in a gate's own addresses, slots and EPTPs."""

    def __init__(self, rng: random.Random, base: int, official: int) -> None:
        self.rng = rng
        near = (crossing.GATE_OFFSET, crossing.GATE_LIST_OFFSET, crossing.GATE_DATA_OFFSET)
        self.addresses = [base + offset for offset in near]
        self.official = official

    def word(self) -> int:
        rng = self.rng
        kind = rng.randrange(8)
        if kind < 3:
            return rng.getrandbits(64)
        if kind < 5:
            return (rng.choice(self.addresses) + rng.randrange(-16, PAGE_SIZE + 16)) % (1 << 64)
        if kind == 5:
            return rng.randrange(520)
        if kind == 6:
            return self.official
        return int(EPTP.of(rng.getrandbits(30) << 12))

    def registers(self) -> dict[str, int]:
        rng = self.rng
        found = {name: self.word() for name in GENERAL}
        upper = rng.getrandbits(32) << 32
        # Mostly as a guest arrives by VMFUNC: EAX = 0, ECX = the slot of a gate.
        if rng.random() < 0.75:
            found["rax"] = upper
            slots = [*range(5), 511, 512, rng.randrange(2, 512)]
            found["rcx"] = rng.getrandbits(32) << 32 | rng.choice(slots)
        direction = 1 << STATUS_BITS["df"]
        found["rflags"] = 2 | rng.getrandbits(12) & _STATUS_MASK | rng.choice((0, direction))
        return found


def _listed(rng: random.Random) -> bytes:
    """Return a random EPTP list whose transient slot is empty."""
    words = [
        int(EPTP.of(rng.getrandbits(30) << 12)) if rng.random() < 0.5 else 0 for _ in range(512)
    ]
    words[1] = 0
    return b"".join(word.to_bytes(8, "little") for word in words)


def check_gate(
    page: bytes, proof: GateProof, *, seed: int, states: int = 60, idle_states: int = 2
) -> Comparison:
    """Run the gate page from every byte in random states and compare with the symbolic paths.

    Args:
        page: the gate page as it was built.
        proof: its symbolic paths.
        seed: seed of the random states.
        states: number of states to run from each byte, for each crossing base.
        idle_states: the same for bytes that are INT3.
    """
    comparison = Comparison(seed)
    paths = {at: [_CompiledPath(path) for path in found] for at, found in proof.paths.items()}
    for base in BASES:
        rng = random.Random(f"{seed} {base}")
        official = int(EPTP.of(rng.getrandbits(30) << 12))
        listed = _listed(rng)
        data = official.to_bytes(8, "little")
        emulator = Emulator(base, GATE_REGIONS, {"code": page, "list": listed, "data": data})
        oracle = _Oracle(paths, emulator, official)
        source = _States(rng, base, official)
        for at, byte in enumerate(page):
            for _ in range(idle_states if byte == _INT3 else states):
                emulator.write(crossing.GATE_LIST_OFFSET, listed[:16])
                _compare(
                    comparison, emulator, oracle, crossing.GATE_OFFSET + at, source.registers()
                )
    return comparison


def _compare(
    comparison: Comparison,
    emulator: Emulator,
    oracle: _Oracle,
    entry: int,
    registers: Mapping[str, int],
) -> None:
    try:
        expected = oracle.predict(entry, registers)
    except _NoPathError as none:
        comparison.count(Run(), "not predicted")
        comparison.disagreements.append(f"entry {entry:#x}: {none}; {_show(registers)}")
        return
    run = emulator.go(entry, registers)
    comparison.count(run, expected.end)
    run, expected = _reconciled(emulator, run, expected)
    seen = run.trace
    wrong = []
    if seen != expected.trace:
        wrong.append(f"instructions {_offsets(seen)}, expected {_offsets(expected.trace)}")
    if run.stop != expected.stop:
        wrong.append(f"stop by {run.stop}, expected {expected.stop}")
    for name, content in expected.registers.items():
        if content is None:
            continue
        mask = _STATUS_MASK | 1 << STATUS_BITS["df"] if name == "rflags" else (1 << 64) - 1
        if (run.registers[name] ^ content) & mask:
            wrong.append(f"{name} {run.registers[name]:#x}, expected {content:#x}")
    if expected.slot is not None and emulator.word(SLOT) != expected.slot:
        wrong.append(f"slot {emulator.word(SLOT):#x}, expected {expected.slot:#x}")
    if wrong:
        what = "; ".join(wrong)
        comparison.disagreements.append(f"entry {entry:#x}: {what}; {_show(registers)}")


def _reconciled(emulator: Emulator, run: Run, expected: _Prediction) -> tuple[Run, _Prediction]:
    """Allow for known differences of the emulator, all of them in how it stops."""
    if expected.stop == _OPEN:
        seen = replace(run, trace=run.trace[: len(expected.trace)], stop=_OPEN)
        return seen, expected
    last = expected.trace[-1]
    # The emulator fetches ahead: it skips the last instruction of a page that no page follows.
    if run.stop == Stop.FETCH == expected.stop and run.trace == expected.trace[:-1]:
        return replace(run, trace=expected.trace), replace(expected, registers={}, slot=None)
    # The page's end cuts an instruction off that would be invalid with any further bytes.
    if (run.stop, expected.stop) == (Stop.INVALID, Stop.FETCH) and last + 1 == _PAGE_END:
        return replace(run, stop=expected.stop), expected
    # LOCK before INT3: the processor calls it invalid, the emulator ignores the prefix.
    if (run.stop, expected.stop) == (Stop.BREAKPOINT, Stop.INVALID):
        code = emulator.read(last, 3) or b""
        if _LOCK in code and code[code.index(_LOCK) + 1 : code.index(_LOCK) + 2] == b"\xcc":
            return replace(run, stop=expected.stop), expected
    return run, expected


def _offsets(trace: Sequence[int]) -> str:
    return " ".join(f"{offset:#x}" for offset in trace)


def _show(registers: Mapping[str, int]) -> str:
    return " ".join(f"{name}={content:#x}" for name, content in registers.items())


def check_sub(image: SubImage, *, user: bool, seed: int, states: int = 500) -> Comparison:
    """Run whole calls in random states: from the first byte of the sub entry page to its VMFUNC.

    Args:
        image: the built object.
        user: whether it was built for callers in user mode.
        seed: seed of the random states.
        states: number of states to run for each crossing base.
    """
    comparison = Comparison(seed)
    contents = {f"image {part.offset:#x}": part.data for part in image.parts}
    for base in BASES:
        rng = random.Random(f"{seed} {base} {user}")
        call = _Call(Emulator(base, sub.sub_regions(image), contents), image, user, rng)
        source = _States(rng, base, int(EPTP.of(rng.getrandbits(30) << 12)))
        for _ in range(states):
            registers = source.registers()
            # The gate leaves DF clear; AC and the rest are the guest's.
            registers["rflags"] &= ~(1 << STATUS_BITS["df"])
            registers["rflags"] |= rng.getrandbits(1) << STATUS_BITS["ac"]
            call.run(comparison, registers, source.official)
    return comparison


class _Call:
    """Calls in one memory, checked at their start, at the object's function and at their end."""

    def __init__(self, emulator: Emulator, image: SubImage, user: bool, rng: random.Random) -> None:
        self.emulator = emulator
        self.user = user
        self.rng = rng
        self.function = image.symbols["elisa_serve"]
        self.at_entry: Mapping[str, int] = {}
        self.result = 0
        self.steps = 0
        self.called = 0
        self.wrong: list[str] = []

    def run(self, comparison: Comparison, registers: Mapping[str, int], eptp: int) -> None:
        emulator = self.emulator
        emulator.write(sub.SLOT, eptp.to_bytes(8, "little"))
        self.at_entry, self.steps, self.called, self.wrong = registers, 0, 0, []
        run = emulator.go(crossing.SUB_ENTRY_OFFSET, registers, self._watch)
        comparison.count(run, "a call and its return")
        self._require(run.stop == Stop.VMFUNC, f"stop by {run.stop}")
        self._require(self.called == 1, f"{self.called} calls of the object's function")
        after = emulator.get("rip") - emulator.base + 3
        self._require(after == crossing.RETURN_OFFSET, f"goes on at {after:#x}")
        self._require(emulator.word(sub.SLOT) == 0, "the slot is not zero")
        for name, content in self._expected():
            self._require(run.registers[name] == content, f"{name} is {run.registers[name]:#x}")
        flags = run.registers["rflags"]
        left = flags & (1 << STATUS_BITS["ac"] | 1 << STATUS_BITS["df"])
        self._require(not left, f"rflags is {flags:#x}")
        if self.wrong:
            comparison.disagreements.append(f"{'; '.join(self.wrong)}; {_show(registers)}")

    def _expected(self) -> Iterator[tuple[str, int]]:
        for name in GENERAL:
            if name in ("rbx", "rbp", "rsp", "r12", "r13", "r14", "r15"):
                yield name, self.at_entry[name]
            else:
                yield name, self.result if name == "rdx" else 0

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def _watch(self, offset: int) -> None:
        self.steps += 1
        if self.steps == 2:
            self._require(self.emulator.word(sub.SLOT) == 0, "the first instruction left the slot")
        if offset == self.function:
            self.called += 1
            self._at_function()

    def _at_function(self) -> None:
        """Check the environment of the object's function, then return with random values."""
        emulator, rng = self.emulator, self.rng
        pointer = emulator.get("rsp")
        self._require(pointer % 16 == 8, f"rsp is {pointer:#x}")
        self._require(emulator.get("rcx") == emulator.address(crossing.ENV_OFFSET), "rcx")
        for name in ("rdi", "rsi", "rdx"):
            self._require(emulator.get(name) == self.at_entry[name], name)
        accesses = emulator.get("rflags") >> STATUS_BITS["ac"] & 1
        self._require(accesses == (0 if self.user else 1), f"RFLAGS.AC is {accesses}")
        back = emulator.word(pointer - emulator.base)
        for name in ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"):
            emulator.set(name, rng.getrandbits(64))
        self.result = emulator.get("rax")
        flags = emulator.get("rflags") & ~_STATUS_MASK | rng.getrandbits(12) & _STATUS_MASK
        emulator.set("rflags", flags)
        below = pointer - emulator.base + 8 - crossing.STACK_OFFSET
        emulator.write(crossing.STACK_OFFSET, rng.randbytes(below))
        emulator.set("rsp", pointer + 8)
        emulator.set("rip", back)
