"""Targets in Python, by atheris: its bytecode counters, and libFuzzer around them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pykvm.resources import PACKAGE
from tests.rigs.fuzz.libfuzzer import LibFuzzer, NoToolError, fill, run_tool
from tests.rigs.fuzz.target import Coverage, Plant, Target, planted

__all__ = ["ScriptedTarget"]

ROOT = Path(__file__).parents[3]


class ScriptedTarget(Target):
    """Modules of pykvm with a harness: ``harness.py`` in its folder, with ``try_input(data)``.

    Args:
        name: see `Target`.
        modules: the modules under test, as paths in the package; they alone guide the search.
        options: more options of libFuzzer.
    """

    def __init__(self, name: str, modules: Sequence[str], *, options: Sequence[str] = ()) -> None:
        super().__init__(name, ", ".join(Path(one).name for one in modules))
        self.modules = modules
        self.harness = f"tests.rigs.fuzz.{self.folder.name}.harness"
        self._options = options

    def missing(self) -> str:
        return "" if importlib.util.find_spec("atheris") else "no atheris here: make setup"

    def fuzzer(self, directory: Path, plant: Plant | None = None) -> LibFuzzer:
        if missing := self.missing():
            raise NoToolError(missing)
        directory.mkdir(parents=True, exist_ok=True)
        places = [ROOT]
        if plant:
            places.insert(0, _copy_with(plant, directory / "planted"))
        return LibFuzzer(
            self._command("fuzz"),
            directory,
            options=["-timeout=60", "-rss_limit_mb=3000", *self._options],
            environment={"PYTHONPATH": ":".join(map(str, places))},
        )

    def coverage(self, directory: Path, inputs: Iterable[bytes]) -> Coverage:
        """Return what the inputs reach of the modules, by coverage.py."""
        directory.mkdir(parents=True, exist_ok=True)
        corpus = fill(directory / "covered", inputs)
        data, report = directory / "covered.data", directory / "covered.json"
        environment = {"PYTHONPATH": str(ROOT), "COVERAGE_FILE": str(data), "COVERAGE_RCFILE": ""}
        include = ",".join(str(PACKAGE / one) for one in self.modules)
        _, module, *words = self._command("run")[1:]
        command = [sys.executable, "-m", "coverage"]
        run_tool(
            [
                *command,
                "run",
                "--branch",
                f"--include={include}",
                "-m",
                module,
                *words,
                str(corpus),
            ],
            **environment,
        )
        run_tool([*command, "json", "-q", "-o", str(report)], **environment)
        totals = json.loads(report.read_text())["totals"]
        return Coverage(
            100 * totals["covered_lines"] / totals["num_statements"],
            100 * totals["covered_branches"] / max(totals["num_branches"], 1),
        )

    def _command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "tests.rigs.fuzz.script", verb, self.name]


def _copy_with(plant: Plant, directory: Path) -> Path:
    """Return a directory with the package, of links but for the file with the fault."""
    shutil.rmtree(directory, ignore_errors=True)
    at, source = directory / PACKAGE.name, PACKAGE
    at.mkdir(parents=True)
    for part in Path(plant.file).parts:
        for entry in source.iterdir():
            if entry.name not in (part, "__pycache__"):
                (at / entry.name).symlink_to(entry)
        at, source = at / part, source / part
        if source.is_dir():
            at.mkdir()
    at.write_text(planted(source.read_text(), plant))
    return directory
