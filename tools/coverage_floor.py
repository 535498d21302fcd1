"""Coverage of the package and the tools by `make test`, and its floor.

    python -m tools.coverage_floor

Only the tests on this host that need no KVM are measured, so that the figure is the same on every
host, together with the commands and child processes that they start. Tests on the emulated host are
not measured, because tracing would double the time of the longest part of `make test`. The floor is
`fail_under` in pyproject.toml. The exit status is 1 if the coverage is lower.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import coverage
from coverage.exceptions import NoDataError

from tools.test_all import COVERAGE, ROOT

_REPORT: Final = COVERAGE.with_name("report.txt")
_MARGIN: Final = 2  # percent by which the coverage may exceed the floor without advice


@dataclass(frozen=True)
class Verdict:
    """Coverage compared with its floor.

    Attributes:
        total: percent of lines and branches that were reached.
        floor: least percent that is accepted.
    """

    total: float
    floor: float

    @property
    def good(self) -> bool:
        return self.total >= self.floor

    def __str__(self) -> str:
        if not self.good:
            return (
                f"coverage: {self.total:.1f} %, below the floor of {self.floor:g} %: test what "
                f"{_REPORT} shows as missing, or lower fail_under in pyproject.toml and say why"
            )
        advice = ""
        if self.total >= self.floor + _MARGIN:
            advice = f"; raise fail_under in pyproject.toml to {int(self.total) - _MARGIN + 1}"
        return f"coverage: {self.total:.1f} %, floor {self.floor:g} % ({_REPORT}){advice}"


def judge(root: Path) -> Verdict:
    """Combine the measurements of all processes of a checkout, and write the report.

    Raises:
        coverage.exceptions.NoDataError: nothing was measured.
    """
    measured = coverage.Coverage(str(root / COVERAGE), config_file=str(root / "pyproject.toml"))
    measured.combine([str((root / COVERAGE).parent)])
    with (root / _REPORT).open("w") as report:
        total = measured.report(file=report, show_missing=True, skip_covered=True)
    floor = measured.get_option("report:fail_under")
    assert isinstance(floor, int | float)
    return Verdict(total, floor)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.coverage_floor",
        description="Compare what `make test` has reached with the floor in pyproject.toml.",
    )
    parser.parse_args(arguments)
    try:
        verdict = judge(ROOT)
    except NoDataError:
        sys.exit("coverage: nothing was measured: run make test first")
    print(verdict)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
