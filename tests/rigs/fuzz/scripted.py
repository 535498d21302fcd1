"""Targets in Python, by atheris: its bytecode counters, and libFuzzer around them."""

from __future__ import annotations

import importlib.util
import json
import shlex
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
        # A program: libFuzzer runs itself again to minimise.
        program = directory / "fuzzer"
        command = shlex.join(["exec", *_command("fuzz", self.name, str(program))])
        program.write_text(f'#!/bin/sh\n{command} "$@"\n')
        program.chmod(0o755)
        return LibFuzzer(
            [str(program)],
            directory,
            options=["-timeout=60", "-rss_limit_mb=3000", *self._options],
            environment={"PYTHONPATH": ":".join(map(str, places))},
        )

    def coverage(self, directory: Path, inputs: Iterable[bytes]) -> Coverage:
        """Return what the inputs reach of the modules, by coverage.py."""
        directory.mkdir(parents=True, exist_ok=True)
        corpus, report = fill(directory / "covered", inputs), directory / "covered.json"
        run_tool(_command("cover", self.name, str(corpus), str(report)), PYTHONPATH=str(ROOT))
        totals = json.loads(report.read_text())["totals"]
        return Coverage(
            100 * totals["covered_lines"] / totals["num_statements"],
            100 * totals["covered_branches"] / max(totals["num_branches"], 1),
        )


def _command(verb: str, *words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "tests.rigs.fuzz", verb, *words]


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
