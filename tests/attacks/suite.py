"""`make attacks`: every attack and every control, here and on the emulated host, row by row.

Exit status 0 only if each attack held, each control succeeded, nothing was skipped, and no row has
an open part.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.attacks.marks import ROOT
from tests.attacks.threats import THREATS, Threat

RESULTS: Final = Path("build") / "attacks"  # below build/, so that it comes back from inside
_TIERS: Final = re.compile(r"mark\.(elisa|kvm)\b")


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


def _run(
    name: str, files: Iterable[str], expression: str, prefix: list[str]
) -> dict[str, set[str]]:
    report = RESULTS / f"{name}.xml"
    (ROOT / report).unlink(missing_ok=True)
    command = [*prefix, "-m", "pytest", "-q", "-m", expression, f"--junitxml={report}", *files]
    subprocess.run(command, cwd=ROOT, check=False)
    return outcomes_of(ROOT / report) if (ROOT / report).exists() else {}


def main() -> int:
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    tests = {test for threat in THREATS for test in (*threat.attacks, *threat.controls)}
    files = sorted({test.split("::")[0] for test in tests})
    inside = [file for file in files if _TIERS.search((ROOT / file).read_text())]
    os.environ.pop("PYKVM_REQUIRE", None)
    builds = "tests/attacks/test_builds.py"  # what the emulated host cannot compile itself
    ours = "(attack or control) and not elisa and not kvm"
    host = _run("host", [builds, *files], f"{ours} or unit and not testbed", [sys.executable])
    pykvm = [str(Path(sys.executable).with_name("pykvm")), "testbed", "--", "python"]
    there = _run("inside", inside, "(attack or control) and (elisa or kvm)", pykvm)
    outcomes = {**host, **there}
    good = True
    for threat in THREATS:
        verdict = judge(threat, outcomes)
        print(f"{threat.row:<4} {verdict.text}")
        good = good and verdict.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
