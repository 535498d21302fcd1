"""The tiers: a skip has a reason, is counted, and is a failure if the tier is required."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]

SAMPLE = """
import pytest

@pytest.mark.unit
def test_runs():
    assert True

@pytest.mark.testbed
def test_in_a_tier_that_is_missing():
    assert True

@pytest.mark.unit
def test_skips_itself():
    pytest.skip("the moon is full")
"""


def _pytest(
    directory: Path, sample: str, require: str | None = None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "pyproject.toml", directory)
    (directory / "test_sample.py").write_text(sample)
    # A claim to be inside the emulated host takes the tier `testbed` away.
    environment = {**os.environ, "PYKVM_TESTBED": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYKVM_REQUIRE", None)
    if require is not None:
        environment["PYKVM_REQUIRE"] = require
    plugins = ["-p", "tests.rigs.tiers", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "test_sample.py", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_skips_are_counted_by_reason(tmp_path: Path) -> None:
    done = _pytest(tmp_path, SAMPLE)
    assert done.returncode == 0, done.stdout
    assert "    1  tier testbed: already inside the emulated host\n" in done.stdout
    assert "    1  the moon is full\n" in done.stdout
    assert "1 passed, 2 skipped" in done.stdout


@pytest.mark.parametrize(
    ("require", "reason", "counts"),
    [
        # pytest counts a failure before the test itself as an error.
        ("testbed", "already inside the emulated host", "1 passed, 1 skipped, 1 error"),
        ("unit", "the moon is full", "1 failed, 1 passed, 1 skipped"),
    ],
)
def test_a_required_tier_is_never_skipped(
    tmp_path: Path, require: str, reason: str, counts: str
) -> None:
    done = _pytest(tmp_path, SAMPLE, require)
    assert done.returncode == 1
    assert f"PYKVM_REQUIRE={require}: " in done.stdout
    assert reason in done.stdout
    assert counts in done.stdout


def test_a_file_may_not_skip_itself_where_tiers_are_required(tmp_path: Path) -> None:
    sample = 'import pytest\npytest.skip("no reason", allow_module_level=True)\n'
    assert _pytest(tmp_path, SAMPLE.replace("import pytest", sample, 1), "elisa").returncode != 0


def test_a_test_without_a_tier_is_refused(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "def test_lost():\n    assert True\n")
    assert done.returncode == 4
    assert "has no tier" in done.stderr


def test_a_tier_is_spelled_out_in_the_file(tmp_path: Path) -> None:
    sample = "import pytest\ntier = 'elisa'\npytestmark = getattr(pytest.mark, tier)\n"
    done = _pytest(tmp_path, sample + "def test_hidden():\n    assert True\n")
    assert done.returncode == 4
    assert "write pytest.mark.elisa in its own file" in done.stderr


def test_an_unknown_tier_is_refused(tmp_path: Path) -> None:
    done = _pytest(tmp_path, SAMPLE, "elisa,typo")
    assert done.returncode == 4
    assert "PYKVM_REQUIRE names no tier: typo" in done.stderr


WEAKENED = """
import pytest

@pytest.mark.unit
def test_of_all_modules():
    assert True

@pytest.mark.unit
@pytest.mark.weakened
def test_of_weakened_modules():
    assert True
"""


def test_what_needs_weakened_modules_runs_only_if_named(tmp_path: Path) -> None:
    """Otherwise they are neither run nor skipped."""
    assert "1 passed, 1 deselected" in _pytest(tmp_path, WEAKENED, "unit").stdout
    assert "1 passed, 1 deselected" in _pytest(tmp_path, WEAKENED, "unit", "-m", "unit").stdout
    named = _pytest(tmp_path, WEAKENED, "unit", "-m", "weakened", "-v").stdout
    assert "1 passed, 1 deselected" in named
    assert "test_of_weakened_modules PASSED" in named


def test_emulated_hosts_leave_native_tests_out(tmp_path: Path) -> None:
    sample = SAMPLE + "\n@pytest.mark.unit\n@pytest.mark.native\ndef test_native():\n    assert 0\n"
    done = _pytest(tmp_path, sample)
    assert "1 passed, 2 skipped, 1 deselected" in done.stdout
