"""Run the kernel's Makefiles and their tools, whose output goes to a log."""

import os
import subprocess
from pathlib import Path

__all__ = ["environment", "run"]


def environment() -> dict[str, str]:
    """What they may see: a user's KCFLAGS or ARCH is not meant, and they listen to it."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def run(command: list[str], directory: Path, log: Path) -> int:
    """Run `command` in `directory`, append it and its output to `log`; its exit status."""
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        return subprocess.run(
            command,
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
