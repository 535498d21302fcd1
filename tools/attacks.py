"""`make attacks`: every attack and every control, on this host and on emulated hosts, row by row.

Controls that need a kernel without a defence run on an emulated host of their own, whose modules
are built with weaken.patch. Tests that need rare processor features run on a newer emulated
processor, with and without a defence. If several series are given, a row must hold on each; the
newer processor and the host with two processors run the first of them. The exit status is 0 only if
each defence held, each control succeeded, nothing was skipped, and no row has an open part.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from pykvm.kernel.series import SERIES, offered_series
from tests.attacks.marks import ROOT
from tests.attacks.threats import THREATS, Threat
from tests.rigs.attacks.weaken import PATCH
from tools import side_by_side, test_all
from tools.side_by_side import Job

NEWER_CPU: Final = "sapphire_rapids"  # of pykvm testbed --cpu
RESULTS: Final = Path("build") / "attacks"  # the testbed copies files below build/ back
_MARKED: Final = "(attack or control)"
_TIERS: Final = re.compile(r"mark\.(elisa|kvm)\b")
_WEAKENED: Final = re.compile(r"mark\.weakened\b")
_PROCESSOR: Final = re.compile(r"mark\.processor\b")


@dataclass(frozen=True)
class Verdict:
    text: str
    good: bool


def judge(threat: Threat, outcomes: Mapping[str, set[str]]) -> Verdict:
    """Return the verdict on one row.

    Args:
        threat: the row.
        outcomes: outcomes of each test's cases, by test (path::function).
    """
    tests = [*threat.attacks, *threat.controls]
    wrong = [test for test in tests if outcomes.get(test, {"not run"}) != {"passed"}]
    if wrong:
        ends = (f"{test}: {', '.join(sorted(outcomes.get(test, {'not run'})))}" for test in wrong)
        return Verdict("FAILED: " + "; ".join(ends), False)
    if threat.open:
        tried = "held as far as tried; " if threat.attacks else ""
        return Verdict(f"{tried}OPEN: {threat.open}", False)
    if threat.no_control:
        return Verdict(f"held; no control: {threat.no_control}", True)
    return Verdict("held; control succeeded", True)


def outcomes_of(report: Path) -> dict[str, set[str]]:
    """Return the outcomes in a JUnit report of pytest, by test."""
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        name = case.attrib["name"].split("[")[0]
        ends = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        kinds = [ends[child.tag] for child in case if child.tag in ends]
        found.setdefault(f"{path}::{name}", set()).add(kinds[0] if kinds else "passed")
    return found


@dataclass(frozen=True)
class Run:
    """A run of pytest.

    Attributes:
        name: name of the run and of its report.
        where: start of the command line, up to the interpreter.
        expression: marks that select the tests.
        files: test files.
    """

    name: str
    where: tuple[str, ...]
    expression: str
    files: tuple[str, ...]

    @property
    def report(self) -> Path:
        return RESULTS / f"{self.name}.xml"

    def command(self) -> list[str]:
        options = ["-q", "-m", self.expression, f"--junitxml={self.report}"]
        return [*self.where, "-m", "pytest", *options, *self.files]


def plan(series: str, *, two: bool) -> tuple[Run, Run, Run]:
    """Return the runs here, on the emulated host, and on the one with weakened modules.

    Args:
        series: kernel of the emulated hosts.
        two: whether the second run has two processors, for the races between them.
    """
    files = _files()
    builds = "tests/attacks/test_builds.py"  # the emulated host cannot compile these itself
    testbed = _testbed("--fast", "--series", series)
    whole = _testbed(*(test_all.TWO if two else ("--fast",)), "--series", series)
    return (
        Run(
            "host",
            (sys.executable,),
            f"{_MARKED} and not elisa and not kvm or unit and not testbed",
            (builds, *files),
        ),
        Run(
            f"inside-{series}",
            (*whole, "--", "python"),
            f"{_MARKED} and (elisa or kvm) and not weakened",
            _with(_TIERS, files),
        ),
        Run(
            f"weakened-{series}",
            (*testbed, "--also", str(PATCH), "--", "python"),
            f"{_MARKED} and weakened",
            _with(_WEAKENED, files),
        ),
    )


def plan_newer(series: str) -> tuple[Run, Run]:
    """Return the runs on the emulated host with a newer processor, which may skip nothing."""
    files = _with(_PROCESSOR, _files())
    testbed = _testbed("--series", series, "--cpu", NEWER_CPU, "--env", "PYKVM_REQUIRE=elisa")
    return (
        Run(
            f"newer-{series}",
            (*testbed, "--", "python"),
            f"{_MARKED} and processor and not weakened",
            files,
        ),
        Run(
            f"newer-weakened-{series}",
            (*testbed, "--also", str(PATCH), "--", "python"),
            f"{_MARKED} and processor and weakened",
            _with(_WEAKENED, files),
        ),
    )


def _files() -> list[str]:
    tests = {test for threat in THREATS for test in (*threat.attacks, *threat.controls)}
    return sorted({test.split("::")[0] for test in tests})


def _testbed(*options: str) -> tuple[str, ...]:
    return (str(Path(sys.executable).with_name("pykvm")), "testbed", *options)


def _job(run: Run, after: str) -> Job:
    # Some runs wait for the one on this host, which builds what emulated hosts cannot compile.
    return Job(f"attacks: {run.name}", run.command(), {"PYKVM_REQUIRE": None}, after)


def _with(mark: re.Pattern[str], files: Iterable[str]) -> tuple[str, ...]:
    return tuple(file for file in files if mark.search((ROOT / file).read_text()))


def all_outcomes(reports: Iterable[Path]) -> dict[str, set[str]]:
    """Return the outcomes in all `reports`, by test.

    A skip counts only if no other report has another outcome of the test.
    """
    found: dict[str, set[str]] = {}
    for report in reports:
        for test, ends in outcomes_of(report).items():
            found.setdefault(test, set()).update(ends)
    return {test: ends - {"skipped"} or ends for test, ends in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try every row of docs/threats.md.")
    parser.add_argument(
        "--series",
        choices=SERIES,
        nargs="+",
        help="kernels to try on (default: all that there are)",
    )
    parser.add_argument(
        "--after-tests",
        action="store_true",
        help="do not repeat what `make test` has just run on the same sources; its results on "
        "all series count",
    )
    options = parser.parse_args(arguments)
    side_by_side.end_on_signals()
    started = time.monotonic()
    known = test_all.reports() if options.after_tests else []
    if options.after_tests:
        print(f"attacks: {'using the' if known else 'no'} results of make test", flush=True)
    chosen = options.series or offered_series()
    runs = [run for series in chosen for run in plan(series, two=series == chosen[0])]
    todo = [run for run in dict.fromkeys(runs) if not known or "weakened" in run.name]
    todo += plan_newer(chosen[0])
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    for report in (ROOT / RESULTS).glob("*.xml"):
        report.unlink()
    first = f"attacks: {todo[0].name}"
    jobs = [_job(todo[0], ""), *(_job(run, "" if known else first) for run in todo[1:])]
    try:
        status = side_by_side.summary(jobs, side_by_side.run(jobs))
    except KeyboardInterrupt:
        return 130
    made = (ROOT / run.report for run in todo)
    outcomes = all_outcomes([*known, *(report for report in made if report.exists())])
    verdicts = [(threat.row, judge(threat, outcomes)) for threat in THREATS]
    for row, verdict in verdicts:
        print(f"{row:<4} {verdict.text}")
    short = sum(not verdict.good for _, verdict in verdicts)
    seconds = time.monotonic() - started
    print(f"attacks: {len(verdicts)} rows, {short} fall short, {seconds:.0f} s")
    return 1 if short or status else 0


if __name__ == "__main__":
    sys.exit(main())
