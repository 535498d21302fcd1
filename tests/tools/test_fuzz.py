"""`make fuzz`, for a second."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.switch.fuzz.fuzzer import missing_tools
from tools.test_all import ROOT

pytestmark = pytest.mark.unit


def test_nothing_is_found_in_a_second(tmp_path: Path) -> None:
    if missing := missing_tools():
        pytest.skip(missing)
    command = [sys.executable, "-m", "tools.fuzz", "--seconds", "1", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "executions, nothing found; switch.c: 100 % of its lines" in done.stdout
