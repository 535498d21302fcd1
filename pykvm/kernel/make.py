"""Run the kernel's Makefiles and their tools, whose output goes to a log."""

import errno
import os
import shlex
import subprocess
from pathlib import Path

__all__ = ["environment", "run"]


def environment() -> dict[str, str]:
    """Return a clean environment: kernel Makefiles honour KCFLAGS and ARCH."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def run(command: list[str], directory: Path, log: Path) -> int:
    """Run `command` in `directory` with its output appended to `log`; return its exit status.

    Raises:
        OSError: the disk is full, as the command says.
    """
    with log.open("ab") as output:
        output.write(os.fsencode(f"$ {shlex.join(command)}\n"))
        output.flush()
        start = output.tell()
        status = subprocess.run(
            command,
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status != 0 and os.strerror(errno.ENOSPC).encode() in log.read_bytes()[start:]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    return status
