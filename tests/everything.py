"""`make test`: every test, on this host and on the emulated Intel host with each kernel series.

Each part leaves a report in pytest's JUnit format in `build/tests`.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm.host.kernel_series import DEFAULT_SERIES, SERIES
from tests import side_by_side
from tests.side_by_side import Job

ROOT: Final = Path(__file__).resolve().parents[1]
REPORTS: Final = Path("build") / "tests"  # below build/, so that they come back from inside

# By series, what its emulated host runs. The default one has two parts, so that they end together.
_INSIDE: Final = (
    *((series, "elisa or kvm") for series in SERIES if series != DEFAULT_SERIES),
    (DEFAULT_SERIES, "elisa"),
    (DEFAULT_SERIES, "kvm and not elisa"),
)


def files_with(tiers: Sequence[str]) -> list[str]:
    """Test files that use a mark of `tiers`; on the emulated host, importing all takes a minute."""
    marks = re.compile(rf"mark\.({'|'.join(tiers)})\b")
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if marks.search(path.read_text())]


def jobs() -> list[Job]:
    """What there is to run, in the order in which it starts."""
    found = [
        Job(
            "on this host",
            [sys.executable, "-m", "pytest", f"--junitxml={REPORTS / 'host.xml'}"],
            {"PYTHONDONTWRITEBYTECODE": None, "PYKVM_REQUIRE": "unit,testbed"},
        )
    ]
    pykvm = str(Path(sys.executable).with_name("pykvm"))
    for series, expression in _INSIDE:
        tiers = [tier for tier in ("elisa", "kvm") if tier in expression.split(" and not ")[0]]
        report = REPORTS / f"{series}-{'-'.join(tiers)}.xml"
        pytest = ["python", "-m", "pytest", "-m", expression, f"--junitxml={report}"]
        found.append(
            Job(
                f"on the emulated host, Linux {series}: {expression}",
                [
                    *(pykvm, "testbed", "--series", series),
                    *("--env", f"PYKVM_REQUIRE={','.join(tiers)}"),
                    *("--", *pytest, *files_with(tiers)),
                ],
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    side_by_side.exit_on_signals()
    os.chdir(ROOT)
    REPORTS.mkdir(parents=True, exist_ok=True)
    for report in REPORTS.glob("*.xml"):
        report.unlink()
    # What pytest compiles here is taken along to the emulated hosts, where it would take long.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only"]
    try:
        subprocess.run(collect, env=environment, stdout=subprocess.DEVNULL, check=False)
        todo = jobs()
        return side_by_side.summary(todo, side_by_side.run(todo))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
