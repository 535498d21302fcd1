"""`make attacks`: every attack and every control, here and on two emulated hosts, row by row.

The controls that need a kernel without a defence run on a host of their own, whose modules are
built with weaken.patch. Exit status 0 only if each attack held, each control succeeded, nothing was
skipped, and no row has an open part.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from pykvm.host.kernel_series import DEFAULT_SERIES, SERIES
from tests.attacks.marks import ROOT
from tests.attacks.threats import THREATS, Threat
from tests.attacks.weaken import PATCH

RESULTS: Final = Path("build") / "attacks"  # below build/, so that it comes back from inside
_TIERS: Final = re.compile(r"mark\.(elisa|kvm)\b")
_WEAKENED: Final = re.compile(r"mark\.weakened\b")


@dataclass(frozen=True)
class Verdict:
    text: str
    good: bool


def judge(threat: Threat, outcomes: Mapping[str, set[str]]) -> Verdict:
    """outcomes: by test, as path::function, what its cases ended with."""
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
    """What pytest's JUnit report says, by test."""
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
    """One run of pytest. where: what it is run with, up to the interpreter."""

    name: str
    where: list[str]
    expression: str
    files: list[str]

    @property
    def report(self) -> Path:
        return RESULTS / f"{self.name}.xml"

    def command(self) -> list[str]:
        options = ["-q", "-m", self.expression, f"--junitxml={self.report}"]
        return [*self.where, "-m", "pytest", *options, *self.files]

    def outcomes(self) -> dict[str, set[str]]:
        report = ROOT / self.report
        return outcomes_of(report) if report.exists() else {}


def plan(series: str) -> tuple[Run, Run, Run]:
    """What runs here, on the emulated host, and on the one with weakened modules."""
    tests = {test for threat in THREATS for test in (*threat.attacks, *threat.controls)}
    files = sorted({test.split("::")[0] for test in tests})
    builds = "tests/attacks/test_builds.py"  # what the emulated host cannot compile itself
    marked = "(attack or control)"
    testbed = [str(Path(sys.executable).with_name("pykvm")), "testbed", "--series", series]
    return (
        Run(
            "host",
            [sys.executable],
            f"{marked} and not elisa and not kvm or unit and not testbed",
            [builds, *files],
        ),
        Run(
            "inside",
            [*testbed, "--", "python"],
            f"{marked} and (elisa or kvm) and not weakened",
            _with(_TIERS, files),
        ),
        Run(
            "weakened",
            [*testbed, "--also", str(PATCH), "--", "python"],
            f"{marked} and weakened",
            _with(_WEAKENED, files),
        ),
    )


def _with(mark: re.Pattern[str], files: Iterable[str]) -> list[str]:
    return [file for file in files if mark.search((ROOT / file).read_text())]


@contextmanager
def _meanwhile(run: Run) -> Iterator[None]:
    """`run` beside what else is done; its output follows when that has ended."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(run.command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
            print(f"attacks: on the emulated host, controls on {PATCH}", flush=True)
            tail = ["tail", f"--pid={process.pid}", "-n", "+1", "-f", log.name]
            subprocess.run(tail, check=False)
        finally:
            process.terminate()
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try every row of docs/threats.md.")
    parser.add_argument("--series", choices=SERIES, default=DEFAULT_SERIES)
    host, inside, weak = plan(parser.parse_args(arguments).series)
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYKVM_REQUIRE", None)
    started = time.monotonic()
    for run in (host, inside, weak):
        (ROOT / run.report).unlink(missing_ok=True)
    print("attacks: on this host", flush=True)
    subprocess.run(host.command(), cwd=ROOT, check=False)
    with _meanwhile(weak):
        print("attacks: on the emulated host (and at the same time on a weakened one)", flush=True)
        subprocess.run(inside.command(), cwd=ROOT, check=False)
    outcomes = {**host.outcomes(), **inside.outcomes(), **weak.outcomes()}
    verdicts = [(threat.row, judge(threat, outcomes)) for threat in THREATS]
    for row, verdict in verdicts:
        print(f"{row:<4} {verdict.text}")
    short = sum(not verdict.good for _, verdict in verdicts)
    seconds = time.monotonic() - started
    print(f"attacks: {len(verdicts)} rows, {short} fall short, {seconds:.0f} s")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
