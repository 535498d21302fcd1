"""The switch built with clang's libFuzzer and sanitizers, and runs of it on inputs.

window_fuzzer.c documents the form of an input, and invariants.c the invariants. All build results
go into a directory of the caller's. The seed corpus is text, one input a line (`read_corpus`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.errors import PykvmError
from pykvm.resources import GUEST_SOURCES, PACKAGE

__all__ = [
    "CORPUS",
    "FINDINGS",
    "SWITCH",
    "Coverage",
    "Fuzzer",
    "NoClangError",
    "Outcome",
    "PlantError",
    "missing_tools",
    "read_corpus",
    "write_corpus",
]

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus.txt"
FINDINGS: Final = HERE / "findings.txt"
SWITCH: Final = GUEST_SOURCES / "switch/switch.c"

_PARTS: Final = ("machine", "accesses", "invariants", "window_fuzzer")

_COMPILE: Final = [
    "-g",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wno-unknown-pragmas",  # for GCC's choice of registers; the sanitizers use others anyway
    f"-I{GUEST_SOURCES / 'include'}",
    f"-I{PACKAGE / 'switch'}",
]
_SANITIZE: Final = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Only the switch guides the search, and it announces each of its loads and stores.
_GUIDE: Final = ["-fsanitize=fuzzer-no-link", "-fsanitize-coverage=trace-loads,trace-stores"]


class NoClangError(PykvmError):
    """A missing tool of clang's."""


class PlantError(PykvmError):
    """A planted fault that no longer fits the source."""


def _tool(name: str) -> str:
    if found := shutil.which(name):
        return found
    raise NoClangError(f"no {name} on this host", "make setup")


def missing_tools() -> str:
    """Return why fuzzing is impossible here; empty if all tools are there."""
    try:
        for name in ("clang", "llvm-profdata", "llvm-cov"):
            _tool(name)
    except NoClangError as error:
        return str(error)
    return ""


def read_corpus(path: Path = CORPUS) -> list[bytes]:
    """Read inputs in hexadecimal, one a line; text after a # is a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [bytes.fromhex(line) for line in lines if line]


def write_corpus(path: Path, inputs: Iterable[bytes], remark: str) -> None:
    """Write a line with a remark and then the inputs, shortest first."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    path.write_text("\n".join([f"# {remark}", *(data.hex() for data in ordered)]) + "\n")


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        finding: the fuzzer's report; empty if it found nothing.
        input: the input that produced the finding.
        executions: number of inputs that were run.
        edges: number of the switch's counters that were hit.
    """

    executions: int
    edges: int
    finding: str
    input: bytes
    output: str


@dataclass(frozen=True)
class Coverage:
    """Coverage of switch.c, in percent."""

    regions: float
    lines: float
    branches: float


class Fuzzer:
    """The fuzzer in `directory`, built when needed.

    Args:
        plant: (old, new), a fault for the fuzzer to find. `old` occurs once in the switch's source
            and is replaced by `new`.

    Raises:
        NoClangError: a tool is missing.
        PlantError: `old` does not occur exactly once.
    """

    def __init__(self, directory: Path, plant: tuple[str, str] | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        source = SWITCH.read_text()
        if plant is not None:
            if source.count(plant[0]) != 1:
                raise PlantError(f"{plant[0]!r} is not once in {SWITCH.name}: adapt the fault")
            source = source.replace(*plant)
        self._source = directory / "switch.c"
        self._source.write_text(source)
        self.binary = directory / "fuzzer"
        self._build()

    def _compile(self, source: Path, *options: str, to: str) -> str:
        target = self.directory / to
        _run([_tool("clang"), *_COMPILE, *options, "-c", str(source), "-o", str(target)])
        return str(target)

    def _compile_rest(self, *options: str, to: str = "") -> list[str]:
        sources = [PACKAGE / "switch/admin.c", *(HERE / f"{name}.c" for name in _PARTS)]
        return [self._compile(one, *options, to=f"{to}{one.stem}.o") for one in sources]

    def _build(self) -> None:
        clang = _tool("clang")
        objects = [
            self._compile(self._source, "-O2", *_SANITIZE, *_GUIDE, to="switch.o"),
            *self._compile_rest("-O1", *_SANITIZE),
        ]
        link = [clang, *_SANITIZE, "-fsanitize=fuzzer", *objects, "-o", str(self.binary)]
        _run(link)

    def run(
        self, seconds: int, *, corpus: Path | None = None, inputs: Iterable[bytes] = ()
    ) -> Outcome:
        """Search for `seconds`, starting from `inputs` and the inputs in the folder `corpus`.

        New inputs go into that folder. With seconds=0, only the given inputs run.
        """
        corpus = self._fill(corpus or self.directory / "corpus", inputs)
        limit = [f"-max_total_time={seconds}"] if seconds else ["-runs=0"]
        found = self.directory / "finding"
        found.unlink(missing_ok=True)
        done = subprocess.run(
            [
                str(self.binary),
                str(corpus),
                *limit,
                "-max_len=4096",
                "-use_value_profile=1",
                "-print_final_stats=1",
                f"-exact_artifact_path={found}",
            ],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
        executions = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        edges = re.findall(r"cov: (\d+)", done.stderr)
        return Outcome(
            executions=int(executions[-1]) if executions else 0,
            edges=int(edges[-1]) if edges else 0,
            finding=_finding(done.stderr) if done.returncode else "",
            input=found.read_bytes() if found.exists() else b"",
            output=done.stderr,
        )

    def minimised(self, corpus: Path) -> list[bytes]:
        """Return a minimal set of the folder's inputs with the same coverage."""
        target = self.directory / "minimised"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        _run([str(self.binary), "-merge=1", "-max_len=4096", str(target), str(corpus)])
        return [path.read_bytes() for path in target.iterdir()]

    def coverage(self, inputs: Iterable[bytes]) -> Coverage:
        """Return the coverage of switch.c by the inputs (clang's source-based coverage)."""
        corpus = self._fill(self.directory / "covered", inputs)
        profile = ["-fprofile-instr-generate", "-fcoverage-mapping"]
        objects = [
            self._compile(self._source, "-O1", *_GUIDE, *profile, to="covered-switch.o"),
            *self._compile_rest("-O1", to="covered-"),
        ]
        binary, raw, data = (
            str(self.directory / f"covered.{end}") for end in ("run", "raw", "data")
        )
        _run([_tool("clang"), "-fsanitize=fuzzer", profile[0], *objects, "-o", binary])
        _run([binary, str(corpus), "-runs=0"], LLVM_PROFILE_FILE=raw)
        _run([_tool("llvm-profdata"), "merge", raw, "-o", data])
        source = str(self._source)
        report = _run([_tool("llvm-cov"), "report", binary, f"-instr-profile={data}", source])
        regions, _, lines, branches = re.findall(r"([\d.]+)%", report.splitlines()[-1])
        return Coverage(float(regions), float(lines), float(branches))

    def _fill(self, corpus: Path, inputs: Iterable[bytes]) -> Path:
        corpus.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (corpus / f"seed-{number:04}").write_bytes(data)
        return corpus


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise PykvmError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _finding(output: str) -> str:
    """Return the line that describes the fault."""
    for pattern in (r".*invariant broken: .*", r".*runtime error: .*", r".*ERROR: .*"):
        if match := re.search(pattern, output):
            return match[0]
    return output.strip()[-500:]
