"""The machine's fingerprint: what a measured number depends on, for the record it stands in.

It names hardware and versions only: no host name, no user, no path.
"""

import importlib.metadata
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

from pykvm.host.processor import read_processor
from pykvm.kernel import modules
from pykvm.kernel import packages as kernel_packages
from pykvm.resources import CHECKOUT, DISTRIBUTION

__all__ = ["commit", "fingerprint", "host_kind", "is_emulated"]


def is_emulated() -> bool:
    """Whether this is the emulated host: the testbed sets PYKVM_TESTBED=1 for what it runs."""
    return bool(os.environ.get("PYKVM_TESTBED"))


def host_kind() -> str:
    """`emulated` or `hardware`, as records have it."""
    return "emulated" if is_emulated() else "hardware"


def fingerprint() -> dict[str, Any]:
    """What this machine is, ready for JSON."""
    processor = read_processor()
    kvm = modules.status()
    return {
        "host": host_kind(),
        "cpu": processor.name,
        "cpu_vendor": processor.vendor,
        "cpu_signature": f"{processor.family}-{processor.model}-{processor.stepping}",
        "cpu_microcode": processor.microcode,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": kernel_packages.running_release(),
        "kvm": kvm.state,
        "kvm_elisa": kvm.elisa,
        "kvm_srcversion": kvm.srcversion,
        "pykvm": _version(),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, with `+` behind it if files differ from it; empty for an installation.

    The emulated host has no git: there the testbed hands the answer down in PYKVM_COMMIT.
    """
    if given := os.environ.get("PYKVM_COMMIT"):
        return given
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return ""
    head = _git(CHECKOUT, "rev-parse", "--short=12", "HEAD")
    changed = _git(CHECKOUT, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        if CHECKOUT is None:
            raise
        # Run from a checkout that is not installed, as in the emulated host.
        project = CHECKOUT / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"])


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
