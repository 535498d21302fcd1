"""`make test`: every test, on this host and on the emulated Intel host with each kernel series.

Each part writes a report in pytest's JUnit format to `build/tests`. The parts on this host also
write their coverage to `build/coverage` (tools/coverage_floor.py).
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.kernel.series import SERIES, default_series, offered_series
from pykvm.testbed.folder import carried_files
from tools import side_by_side
from tools.side_by_side import Job

ROOT: Final = Path(__file__).resolve().parents[1]
REPORTS: Final = Path("build") / "tests"  # the testbed copies files below build/ back

COVERAGE: Final = Path("build") / "coverage" / "data"  # each process adds a suffix

_WITH_KVM: Final = "kvm or elisa"
_STATE: Final = "checkout"
_MADE: Final = re.compile(r"\.(so|pyc)$")

TWO: Final = ("--cpus", "2")
"""Options of `pykvm testbed` for the series whose tests run on two processors."""

# The longest tests of this host, which run at the same time as those on the emulated hosts.
_LATER: Final = ("tests/switch", "tests/verify")


def files_with(tiers: Sequence[str]) -> list[str]:
    """Return the test files that use a mark of `tiers`.

    Importing all test files would take a minute on the emulated host.
    """
    marks = re.compile(rf"mark\.({'|'.join(tiers)})\b")
    return [file for file in all_files() if marks.search((ROOT / file).read_text())]


def checkout_key() -> str:
    """Return a hash of the checkout's sources, which tells reports of other sources apart."""
    names = carried_files(ROOT)
    sources = (n for n in names if not n.startswith("build/") and not _MADE.search(n))
    return cache.key(*(item for name in sources for item in (name, ROOT / name)))


def reports() -> list[Path]:
    """Return the reports of the last `make test`.

    The list is empty if a report is missing or the sources have changed since.
    """
    found = [ROOT / REPORTS / f"{name}.xml" for name in _report_names()]
    state = ROOT / REPORTS / _STATE
    if not state.is_file() or state.read_text() != checkout_key():
        return []
    return found if all(report.is_file() for report in found) else []


def _report_names() -> list[str]:
    options = [word for job in jobs() for word in job.command if word.startswith("--junitxml=")]
    return [Path(option.partition("=")[2]).stem for option in options]


def all_files() -> list[str]:
    """Return all test files, relative to the checkout."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def jobs() -> list[Job]:
    """Return the jobs in the order in which they start."""
    later = {*files_with(["testbed"]), *(f for f in all_files() if f.startswith(_LATER))}
    first = "on this host"
    found = [
        _on_this_host(first, "host", [file for file in all_files() if file not in later]),
        _on_this_host("on this host, what takes long", "host-later", sorted(later)),
    ]
    # The jobs on this host build guests and objects, which takes longer inside. The default series
    # first, because two processors take twice as long. What is counted depends on no series: it is
    # the guest's and the object's.
    rest = f"({_WITH_KVM}) and not counted"
    found.append(_on_emulated_host(default_series(), f"{rest} and not linux", first, *TWO))
    found.append(_on_emulated_host(default_series(), "counted", first))
    found.append(_on_emulated_host(default_series(), "linux", first, "--fast"))
    for series in offered_series():
        if series != default_series():
            found.append(_on_emulated_host(series, rest, first, "--fast"))
    return [*found, _with_this_kvm()]


def _on_this_host(name: str, report: str, files: Sequence[str]) -> Job:
    pytest = ["pytest", "-m", f"not ({_WITH_KVM})", f"--junitxml={REPORTS / report}.xml"]
    # The emulated hosts get the bytecode that pytest writes here.
    environment = {
        "PYTHONDONTWRITEBYTECODE": None,
        "PYKVM_REQUIRE": "unit,testbed",
        "COVERAGE_FILE": str(ROOT / COVERAGE),
        "COVERAGE_RCFILE": str(ROOT / "pyproject.toml"),
    }
    return Job(name, [sys.executable, "-m", "coverage", "run", "-m", *pytest, *files], environment)


def _on_emulated_host(series: str, marks: str, after: str, *options: str) -> Job:
    tiers = ["elisa", "kvm"]
    kind = {TWO: "two", ("--fast",): "fast"}.get(options, "counted")
    report = REPORTS / f"{series}-{kind}.xml"
    pytest = ["python", "-m", "pytest", "-m", marks, f"--junitxml={report}"]
    testbed = [str(Path(sys.executable).with_name("pykvm")), "testbed", "--series", series]
    require = ["--env", f"PYKVM_REQUIRE={','.join(tiers)}"]
    files = files_with([marks] if marks in ("counted", "linux") else tiers)
    processors = " on two processors" if options == TWO else ""
    name = f"on the emulated host, Linux {series}{processors}: {marks}"
    return Job(name, [*testbed, *options, *require, "--", *pytest, *files], after=after)


def _with_this_kvm() -> Job:
    # Without KVM these tests are skipped. They are not in the coverage, which would vary by host.
    pytest = ["pytest", "-m", _WITH_KVM, f"--junitxml={REPORTS / 'host-kvm'}.xml"]
    command = [sys.executable, "-m", *pytest, *files_with(["kvm", "elisa"])]
    return Job("on this host, with its KVM", command, {"PYKVM_REQUIRE": None})


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    side_by_side.end_on_signals()
    os.chdir(ROOT)
    REPORTS.mkdir(parents=True, exist_ok=True)
    for report in REPORTS.glob("*.xml"):
        report.unlink()
    (REPORTS / _STATE).write_text(checkout_key())
    for series in SERIES:
        if series not in offered_series():
            print(f"==== not on Linux {series}: Debian offers no such kernel here", flush=True)
    for file in COVERAGE.parent.glob(f"{COVERAGE.name}*"):
        file.unlink()
    try:
        todo = jobs()
        status = side_by_side.summary(todo, side_by_side.run(todo))
    except KeyboardInterrupt:
        return 130
    # In a process of its own, because this module must not need the package `coverage`.
    reached = subprocess.run([sys.executable, "-m", "tools.coverage_floor"], check=False)
    return status or reached.returncode


if __name__ == "__main__":
    sys.exit(main())
