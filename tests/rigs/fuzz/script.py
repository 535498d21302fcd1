"""``python -m tests.rigs.fuzz.script VERB TARGET ...``: a target in Python.

``fuzz`` takes libFuzzer's arguments; ``run`` runs the inputs in a folder, without atheris.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.rigs.fuzz.scripted import ScriptedTarget
from tests.rigs.fuzz.targets import TARGETS


def main() -> None:
    verb, name, *arguments = sys.argv[1:]
    target = TARGETS[name]
    assert isinstance(target, ScriptedTarget)
    if verb == "run":
        try_input = importlib.import_module(target.harness).try_input
        for path in sorted(Path(arguments[0]).iterdir()):
            try_input(path.read_bytes())
        return
    import atheris  # noqa: PLC0415  (not needed to run inputs)

    names = [
        ".".join(("pykvm", *Path(one).with_suffix("").parts)).removesuffix(".__init__")
        for one in target.modules
    ]
    with atheris.instrument_imports(include=names):
        try_input = importlib.import_module(target.harness).try_input
    atheris.Setup([f"{sys.argv[0]} {name}", *arguments], try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
