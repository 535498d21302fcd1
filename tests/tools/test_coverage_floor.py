"""The minimum coverage: how it is counted, and the report below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import coverage_floor, test_all
from tools.coverage_floor import Verdict

pytestmark = pytest.mark.unit

STARTS_ANOTHER = """
import os, subprocess, sys
subprocess.run([sys.executable, "measured/other.py"], check=True)
if len(sys.argv) > 1:
    print("never")
    print("reached")
"""
FORKS = """
import os
if child := os.fork():
    os.waitpid(child, 0)
else:
    number = 1
    os._exit(number - 1)
"""


def measure(directory: Path) -> None:
    """Run a program that starts another, as `make test` runs pytest."""
    settings = (test_all.ROOT / "pyproject.toml").read_text()
    settings, count = re.subn(r'(?m)^source = \["pykvm", "tools"\]$', 'source = ["."]', settings)
    assert count == 1
    (directory / "pyproject.toml").write_text(settings)
    (directory / "measured").mkdir()
    (directory / "measured" / "program.py").write_text(STARTS_ANOTHER)
    (directory / "measured" / "other.py").write_text(FORKS)
    data = directory / test_all.COVERAGE
    data.parent.mkdir(parents=True)
    environment = {"COVERAGE_FILE": str(data), "COVERAGE_RCFILE": str(directory / "pyproject.toml")}
    command = [sys.executable, "-m", "coverage", "run", "measured/program.py"]
    subprocess.run(command, cwd=directory, env=environment, check=True)


def test_commands_and_children_count(tmp_path: Path) -> None:
    measure(tmp_path)
    verdict = coverage_floor.judge(tmp_path)
    # All but two of 10 lines, and all of 4 branches but the one to them.
    assert verdict.total == pytest.approx(100 * (8 + 3) / (10 + 4))
    assert "measured/program.py" in (tmp_path / "build/coverage/report.txt").read_text()


def test_below_the_floor() -> None:
    verdict = Verdict(69.94, 70)
    assert not verdict.good
    assert str(verdict).startswith("coverage: 69.9 %, below the floor of 70 %: test what build/")


def test_a_floor_that_has_fallen_behind() -> None:
    verdict = Verdict(73.5, 70)
    assert verdict.good
    assert str(verdict).endswith("; raise fail_under in pyproject.toml to 72")
    assert "raise" not in str(Verdict(71.9, 70))
    assert "raise" not in str(Verdict(73.5, 72))


def test_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / test_all.COVERAGE).parent.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(coverage_floor, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="coverage: nothing was measured: run make test first"):
        coverage_floor.main([])


def test_the_parts_without_kvm_are_measured() -> None:
    measured = {job.name for job in test_all.jobs() if "coverage" in job.command}
    assert measured == {"on this host", "on this host, what takes long"}
