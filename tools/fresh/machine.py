"""Commands in a root file system, run as on a machine of their own."""

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
"""Environment of root after a login."""

_INIT: Final = Path(__file__).with_name("init.py")


def run(
    root: Path,
    command: str,
    *,
    directory: str = "/root",
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command in a root file system; return its exit status.

    When the function returns or raises, no process of the command runs any more, and nothing is
    mounted.

    Args:
        root: root file system.
        command: shell command.
        directory: working directory, in `root`.
        environment: environment variables in addition to `ENVIRONMENT`.
    """
    process = subprocess.Popen(
        # setpriv lets unshare be killed if this process is killed.
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
    """Replace this process by a shell in the root file system `root`; see `run`."""
    command = _in_namespaces(root, directory, "exec bash -i")
    os.execvpe(command[0], command, _complete(environment))


def _in_namespaces(root: Path, directory: str, command: str) -> list[str]:
    init = ["/usr/bin/python3", "-I", str(_INIT), str(root), directory, command]
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--", *init]


def _complete(environment: Mapping[str, str] | None) -> dict[str, str]:
    return {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb"), **(environment or {})}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # When unshare has reaped its child, every process in the namespace has ended. If unshare
        # itself were killed, they might still be writing.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
    process.wait()
