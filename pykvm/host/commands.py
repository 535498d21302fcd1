"""Commands as this user can type them: pykvm by the name it was called by, root's with sudo."""

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["again_as_root", "as_root", "emulated_host", "program"]


def program() -> str:
    """Return how pykvm was called, for the commands that messages name.

    That is "pykvm" where the shell finds the same program by that name, else its path, or
    `python3 -m pykvm`. A user's own program that imports pykvm is told "pykvm".
    """
    called = Path(sys.argv[0])
    if _is_module(called):
        return shlex.join([sys.orig_argv[0], "-m", "pykvm"])
    if not _is_program(called):
        return "pykvm"
    found = shutil.which("pykvm")
    if found is not None and os.path.samefile(found, called):
        return "pykvm"
    return shlex.quote(str(called))


def as_root(command: str) -> str:
    """Return `command` as this user has to type it for root to run it.

    sudo looks for programs in a path of its own, so a `command` that begins with `program()` is
    given the whole path.
    """
    if os.geteuid() == 0:
        return command
    if command.startswith(f"{program()} "):
        command = _whole_path() + command.removeprefix(program())
    return f"sudo {command}" if shutil.which("sudo") else f"su -c {shlex.quote(command)}"


def again_as_root() -> str:
    """Return how root can run the present command."""
    called = Path(sys.argv[0])
    if _is_module(called) or _is_program(called):
        return as_root(f"{program()} {shlex.join(sys.argv[1:])}")
    return "run this program as root"


def emulated_host() -> str:
    """Return the step for a machine that cannot run ELISA itself."""
    return f"use the emulated host: {program()} testbed -- COMMAND"


def _is_module(called: Path) -> bool:
    return called.name == "__main__.py" and called.parent.name == "pykvm"


def _is_program(called: Path) -> bool:
    return called.name == "pykvm" and called.is_file()


def _whole_path() -> str:
    called = Path(sys.argv[0])
    if _is_module(called):
        return shlex.join([sys.executable, "-m", "pykvm"])
    if _is_program(called):
        return shlex.quote(os.path.abspath(called))
    return "pykvm"
