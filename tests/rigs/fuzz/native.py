"""Targets in C: the sources under test and a harness, built with clang's libFuzzer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pykvm.resources import PACKAGE
from tests.rigs.fuzz.libfuzzer import LibFuzzer, NoToolError, fill, find_tool, run_tool
from tests.rigs.fuzz.target import HERE, Coverage, Plant, Target, planted

__all__ = ["NativeTarget", "missing_tools"]

SANITIZE: Final = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
_COMPILE: Final = ["-std=gnu11", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra"]
_INPUT: Final = "input/input.c"
_PROFILE: Final = ["-fprofile-instr-generate", "-fcoverage-mapping"]


def missing_tools() -> str:
    """Return why nothing in C can be fuzzed here; empty if all tools are there."""
    try:
        for name in ("clang", "llvm-profdata", "llvm-cov"):
            find_tool(name)
    except NoToolError as error:
        return str(error)
    return ""


def _found(name: str) -> Path:
    return next(path for path in (PACKAGE / name, HERE / name) if path.exists())


class NativeTarget(Target):
    """Sources in C with a harness.

    Args:
        name: see `Target`; the harness is every ``*.c`` of its folder.
        sources: the sources under test in the package; they alone guide the search.
        include: directories of the package in which headers are looked up.
        link: more options of the linker.
        beside: further sources of the harness, relative to the package or to tests/rigs/fuzz.
        guide: more options for the sources under test, such as trace-loads, or the names of what
            the harness does in place of the kernel.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[str],
        *,
        include: Sequence[str] = (),
        link: Sequence[str] = (),
        beside: Sequence[str] = (),
        guide: Sequence[str] = (),
    ) -> None:
        super().__init__(name, ", ".join(Path(one).name for one in sources))
        self._sources = sources
        self._beside = [_found(one) for one in (_INPUT, *beside)]
        folders = [*(PACKAGE / one for one in include), *(one.parent for one in self._beside)]
        self._include = [f"-I{folder}" for folder in folders]
        self._guide = [*guide, "-fsanitize=fuzzer-no-link"]
        self._link = [*link]

    def missing(self) -> str:
        return missing_tools()

    def fuzzer(self, directory: Path, plant: Plant | None = None) -> LibFuzzer:
        directory.mkdir(parents=True, exist_ok=True)
        guided = [
            self._compile(source, directory, "-O2", *SANITIZE, *self._guide)
            for source in self._written(directory, plant)
        ]
        program = self._linked(directory / "fuzzer", guided, *SANITIZE)
        return LibFuzzer([str(program)], directory, options=["-len_control=0"])

    def coverage(self, directory: Path, inputs: Iterable[bytes]) -> Coverage:
        """Return what the inputs reach of the sources (clang's source-based coverage)."""
        directory.mkdir(parents=True, exist_ok=True)
        corpus = fill(directory / "covered", inputs)
        sources = self._written(directory, None)
        # With the search's own counters, or libFuzzer refuses to run.
        options = ("-O1", *_PROFILE, *self._guide)
        guided = [self._compile(source, directory, *options) for source in sources]
        program = self._linked(directory / "covered.run", guided, _PROFILE[0])
        raw, data = (str(directory / f"covered.{end}") for end in ("raw", "data"))
        run_tool([str(program), str(corpus), "-runs=0"], LLVM_PROFILE_FILE=raw)
        run_tool([find_tool("llvm-profdata"), "merge", raw, "-o", data])
        report = run_tool(
            [
                *(find_tool("llvm-cov"), "report", str(program), f"-instr-profile={data}"),
                *map(str, sources),
            ]
        )
        _, _, lines, branches = re.findall(r"([\d.]+)%", report.splitlines()[-1])
        return Coverage(float(lines), float(branches))

    def _written(self, directory: Path, plant: Plant | None) -> list[Path]:
        """Return copies of the sources, one of them perhaps with a fault."""
        copies = []
        for name in self._sources:
            text = (PACKAGE / name).read_text()
            copies.append(directory / Path(name).name)
            copies[-1].write_text(planted(text, plant) if plant and plant.file == name else text)
        return copies

    def _compile(self, source: Path, directory: Path, *options: str) -> str:
        target = directory / f"{source.stem}.o"
        beside = [f"-I{(PACKAGE / name).parent}" for name in self._sources]
        command = [find_tool("clang"), *_COMPILE, *options, *beside, *self._include]
        run_tool([*command, "-c", str(source), "-o", str(target)])
        return str(target)

    def _linked(self, program: Path, guided: Sequence[str], *options: str) -> Path:
        harness = [
            self._compile(source, program.parent, "-O1", *options)
            for source in [*sorted(self.folder.glob("*.c")), *self._beside]
        ]
        files = [*guided, *harness, "-o", str(program)]
        run_tool([find_tool("clang"), *options, "-fsanitize=fuzzer", *files, *self._link])
        return program
