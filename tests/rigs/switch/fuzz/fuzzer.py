"""The switch built with clang's libFuzzer and sanitizers, and runs of it on inputs.

window_fuzzer.c documents the form of an input, and invariants.c the invariants. All build results
go into a directory of the caller's. The seed corpus is text, one input a line (`read_corpus`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pykvm.resources import GUEST_SOURCES, PACKAGE
from tests.rigs.fuzz import target
from tests.rigs.fuzz.libfuzzer import LibFuzzer, Outcome, fill, find_tool, run_tool
from tests.rigs.fuzz.native import SANITIZE, missing_tools
from tests.rigs.fuzz.target import Coverage, Plant, Target, planted

__all__ = [
    "CORPUS",
    "FINDINGS",
    "SWITCH",
    "Fuzzer",
    "SwitchTarget",
    "missing_tools",
]

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus.txt"
FINDINGS: Final = HERE / "findings.txt"
SWITCH: Final = GUEST_SOURCES / "switch/switch.c"

_INPUT: Final = target.HERE / "input"

_PARTS: Final = ("machine", "accesses", "invariants", "window_fuzzer")

_COMPILE: Final = [
    "-g",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wno-unknown-pragmas",  # for GCC's choice of registers; the sanitizers use others anyway
    f"-I{GUEST_SOURCES / 'include'}",
    f"-I{PACKAGE / 'switch'}",
    f"-I{_INPUT}",
]
# Only the switch guides the search, and it announces each of its loads and stores.
_GUIDE: Final = ["-fsanitize=fuzzer-no-link", "-fsanitize-coverage=trace-loads,trace-stores"]


class Fuzzer:
    """The fuzzer in `directory`, built when needed.

    Args:
        plant: (old, new), a fault for the fuzzer to find. `old` occurs once in the switch's source
            and is replaced by `new`.

    Raises:
        NoToolError: a tool is missing.
        PlantError: `old` does not occur exactly once.
    """

    def __init__(self, directory: Path, plant: tuple[str, str] | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        source = SWITCH.read_text()
        if plant is not None:
            source = planted(source, Plant(SWITCH.name, *plant))
        self._source = directory / "switch.c"
        self._source.write_text(source)
        self._build(directory / "fuzzer")
        self._fuzzer = LibFuzzer([str(directory / "fuzzer")], directory)

    def _compile(self, source: Path, *options: str, to: str) -> str:
        target = self.directory / to
        run_tool([find_tool("clang"), *_COMPILE, *options, "-c", str(source), "-o", str(target)])
        return str(target)

    def _compile_rest(self, *options: str, to: str = "") -> list[str]:
        own = [HERE / f"{name}.c" for name in _PARTS]
        sources = [PACKAGE / "switch/admin.c", _INPUT / "input.c", *own]
        return [self._compile(one, *options, to=f"{to}{one.stem}.o") for one in sources]

    def _build(self, program: Path) -> None:
        objects = [
            self._compile(self._source, "-O2", *SANITIZE, *_GUIDE, to="switch.o"),
            *self._compile_rest("-O1", *SANITIZE),
        ]
        clang = find_tool("clang")
        run_tool([clang, *SANITIZE, "-fsanitize=fuzzer", *objects, "-o", str(program)])

    def run(
        self, seconds: int, *, corpus: Path | None = None, inputs: Iterable[bytes] = ()
    ) -> Outcome:
        """Search; see `LibFuzzer.run`."""
        return self._fuzzer.run(seconds, corpus=corpus, inputs=inputs)

    def minimised(self, corpus: Path) -> list[bytes]:
        """Return a minimal set of the folder's inputs with the same coverage."""
        return self._fuzzer.minimised(corpus)

    def coverage(self, inputs: Iterable[bytes]) -> Coverage:
        """Return the coverage of switch.c by the inputs (clang's source-based coverage)."""
        corpus = fill(self.directory / "covered", inputs)
        profile = ["-fprofile-instr-generate", "-fcoverage-mapping"]
        objects = [
            self._compile(self._source, "-O1", *_GUIDE, *profile, to="covered-switch.o"),
            *self._compile_rest("-O1", to="covered-"),
        ]
        binary, raw, data = (
            str(self.directory / f"covered.{end}") for end in ("run", "raw", "data")
        )
        run_tool([find_tool("clang"), "-fsanitize=fuzzer", profile[0], *objects, "-o", binary])
        run_tool([binary, str(corpus), "-runs=0"], LLVM_PROFILE_FILE=raw)
        run_tool([find_tool("llvm-profdata"), "merge", raw, "-o", data])
        source = str(self._source)
        report = run_tool(
            [find_tool("llvm-cov"), "report", binary, f"-instr-profile={data}", source]
        )
        _, _, lines, branches = re.findall(r"([\d.]+)%", report.splitlines()[-1])
        return Coverage(float(lines), float(branches))


class SwitchTarget(Target):
    """The switch as a target like others."""

    def __init__(self) -> None:
        super().__init__("switch", SWITCH.name, HERE)

    def missing(self) -> str:
        return missing_tools()

    def fuzzer(self, directory: Path, plant: Plant | None = None) -> Fuzzer:
        return Fuzzer(directory, (plant.old, plant.new) if plant else None)

    def coverage(self, directory: Path, inputs: Iterable[bytes]) -> Coverage:
        return Fuzzer(directory).coverage(inputs)
