"""The checks before a commit are those of `make lint`, and cover everything."""

import re
import subprocess
import sys
import tomllib

import pytest

from tools.test_all import ROOT

pytestmark = pytest.mark.unit

HOOKS = ROOT / ".pre-commit-config.yaml"


def test_hooks_are_what_make_lint_runs() -> None:
    hooks = re.findall(r"^ +entry: (.*)$", HOOKS.read_text(), re.MULTILINE)
    command = ["make", "--dry-run", "--no-print-directory", "lint"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-len(hooks) :] == hooks
    assert {hook.split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_pre_commit_takes_the_hooks() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(HOOKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_types_of_every_source_are_checked() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {path.split("/")[0] for path in listing.stdout.splitlines()} == set(checked)
