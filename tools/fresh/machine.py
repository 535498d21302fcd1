"""A root file system, and commands that run in it as on a machine of its own."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

__all__ = ["ENVIRONMENT", "enter", "run"]

ENVIRONMENT: Final = {
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
"""What a login of root has."""

_INIT: Final = Path(__file__).with_name("init.py")


def run(
    root: Path,
    command: str,
    *,
    directory: str = "/root",
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` in the system at `root`; return its exit status.

    However this function is left, nothing of the command runs any more, and nothing is mounted.

    directory: where to run it, in `root`. environment: variables besides `ENVIRONMENT`.
    """
    process = subprocess.Popen(
        # The first ends the second if this process is killed.
        ["setpriv", "--pdeathsig", "KILL", "--", *_in_namespaces(root, directory, command)],
        env=_complete(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is for this process alone
    )
    try:
        return process.wait()
    finally:
        _end(process)


def enter(
    root: Path, *, directory: str = "/root", environment: Mapping[str, str] | None = None
) -> NoReturn:
    """Become a shell in the system at `root`; see `run`."""
    command = _in_namespaces(root, directory, "exec bash -i")
    os.execvpe(command[0], command, _complete(environment))


def _in_namespaces(root: Path, directory: str, command: str) -> list[str]:
    init = ["/usr/bin/python3", "-I", str(_INIT), str(root), directory, command]
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--", *init]


def _complete(environment: Mapping[str, str] | None) -> dict[str, str]:
    return {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb"), **(environment or {})}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # Once unshare has seen its child end, every process in the namespace has ended. If it
        # were killed itself, they could still be writing.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
    process.wait()
