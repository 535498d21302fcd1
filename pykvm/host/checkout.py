"""The checkout that pykvm runs from, as records and the emulated host name it."""

import os
import subprocess
from pathlib import Path

from pykvm.host import git
from pykvm.resources import CHECKOUT

__all__ = ["commit"]


def commit() -> str:
    """Return the checkout's commit, with `+` behind it if files differ; empty for an installation.

    The emulated host has no git: there the testbed hands the answer down in PYKVM_COMMIT.
    """
    if given := os.environ.get("PYKVM_COMMIT"):
        return given
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return ""
    head = _git(CHECKOUT, "rev-parse", "--short=12", "HEAD")
    changed = _git(CHECKOUT, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=git.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
