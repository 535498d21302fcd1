"""``python -m tests.rigs.fuzz VERB TARGET ...``: a target in Python.

``fuzz TARGET PROGRAM ...`` takes libFuzzer's arguments behind the name of the program that runs it;
``cover TARGET FOLDER REPORT`` runs the inputs in a folder and writes which lines they have reached.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from pykvm.resources import PACKAGE
from tests.rigs.fuzz.scripted import ScriptedTarget
from tests.rigs.fuzz.targets import TARGETS


def main() -> None:
    verb, name, *arguments = sys.argv[1:]
    target = TARGETS[name]
    assert isinstance(target, ScriptedTarget)
    if verb == "cover":
        cover(target, Path(arguments[0]), Path(arguments[1]))
    else:
        fuzz(target, arguments)


def fuzz(target: ScriptedTarget, arguments: list[str]) -> None:
    """Fuzz, with the options of libFuzzer."""
    import atheris  # noqa: PLC0415  (not needed to run inputs)

    wanted = {PACKAGE / one for one in target.modules}
    # It takes whole packages, and modules to leave out.
    others = [_module(path) for path in PACKAGE.rglob("*.py") if path not in wanted]
    with atheris.instrument_imports(include=[PACKAGE.name], exclude=others):
        try_input = importlib.import_module(target.harness).try_input
    atheris.Setup(arguments, try_input)
    atheris.Fuzz()


def cover(target: ScriptedTarget, corpus: Path, report: Path) -> None:
    """Run the inputs in a folder, and write a report of coverage.py."""
    from coverage import Coverage  # noqa: PLC0415

    coverage = Coverage(
        None, config_file=False, branch=True, include=[str(PACKAGE / one) for one in target.modules]
    )
    coverage.start()
    try_input = importlib.import_module(target.harness).try_input
    for path in sorted(corpus.iterdir()):
        try_input(path.read_bytes())
    coverage.stop()
    coverage.json_report(outfile=str(report))


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


if __name__ == "__main__":
    main()
