"""`make fuzz`, for a second."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.fuzz.native import missing_tools
from tools.test_all import ROOT

pytestmark = pytest.mark.unit


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_nothing_is_found_in_a_second(tmp_path: Path) -> None:
    if missing := missing_tools():
        pytest.skip(missing)
    done = fuzz("switch", "--seconds", "1", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "executions, nothing found; switch.c: 100 % of the lines" in done.stdout


def test_a_target_that_is_not_there() -> None:
    done = fuzz("swich")
    assert done.returncode == 2
    assert "no target 'swich': use switch, " in done.stderr
