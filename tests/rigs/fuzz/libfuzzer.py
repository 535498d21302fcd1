"""Programs with libFuzzer's command line: those that clang makes, and atheris for Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = ["LibFuzzer", "NoToolError", "Outcome", "find_tool", "run_tool"]


# What it is, and the last place of its traceback.
_EXCEPTION = re.compile(
    r"Uncaught Python exception: ===\n(?P<what>(?s:.*?))\nTraceback(?s:.*?)"
    r'File "[^"]*?(?P<file>[^/"]+)", line (?P<line>\d+)(?!(?s:.*)\n  File ")'
)


class NoToolError(PykvmError):
    """A missing tool of the fuzzers'."""


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        executions: number of inputs that were run.
        edges: number of the counters under test that were hit.
        finding: the line that tells what is wrong; empty if it found nothing.
        input: the input that produced the finding.
        output: everything that the fuzzer has said.
    """

    executions: int
    edges: int
    finding: str
    input: bytes
    output: str


class LibFuzzer:
    """A fuzzer that is ready to run.

    Args:
        command: the program.
        directory: where its corpus and findings go.
        options: more options for each run.
        environment: more variables for each run.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [*command]
        self._directory = directory
        self._options = ["-max_len=4096", *options]
        self._environment = dict(environment or {})

    def run(
        self, seconds: int, *, corpus: Path | None = None, inputs: Iterable[bytes] = ()
    ) -> Outcome:
        """Search for `seconds`, starting from `inputs` and the inputs in the folder `corpus`.

        New inputs go into that folder. With seconds=0, only the given inputs run.
        """
        corpus = fill(corpus or self._directory / "corpus", inputs)
        limit = [f"-max_total_time={seconds}"] if seconds else ["-runs=0"]
        found = self._directory / "finding"
        found.unlink(missing_ok=True)
        done = subprocess.run(
            [
                *(*self._command, str(corpus), *limit, *self._options),
                *("-use_value_profile=1", "-print_final_stats=1", f"-exact_artifact_path={found}"),
            ],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
            env={**os.environ, **self._environment},
        )
        executions = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        edges = re.findall(r"cov: (\d+)", done.stderr)
        return Outcome(
            executions=int(executions[-1]) if executions else 0,
            edges=int(edges[-1]) if edges else 0,
            finding=_finding(done.stdout + done.stderr) if done.returncode else "",
            input=found.read_bytes() if found.exists() else b"",
            output=done.stdout + done.stderr,
        )

    def minimised(self, corpus: Path) -> list[bytes]:
        """Return a minimal set of the folder's inputs with the same coverage."""
        target = self._directory / "minimised"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        options = ["-merge=1", *self._options, str(target), str(corpus)]
        run_tool([*self._command, *options], **self._environment)
        return [path.read_bytes() for path in target.iterdir()]


def fill(corpus: Path, inputs: Iterable[bytes]) -> Path:
    """Write inputs into a folder, and return that."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(inputs):
        (corpus / f"seed-{number:04}").write_bytes(data)
    return corpus


def find_tool(name: str) -> str:
    """Return the path of a program.

    Raises:
        NoToolError: it is not there.
    """
    if found := shutil.which(name):
        return found
    raise NoToolError(f"no {name} on this host", "make setup")


def run_tool(command: Sequence[str], **environment: str) -> str:
    """Run a command to its end and return its output.

    Raises:
        PykvmError: it fails.
    """
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
    if match := re.search(_EXCEPTION, output):
        return f"{' '.join(match['what'].split())} (line {match['line']} of {match['file']})"
    for pattern in (r".*invariant broken: .*", r".*runtime error: .*", r".*ERROR: .*"):
        if match := re.search(pattern, output):
            return match[0]
    return output.strip()[-500:]
