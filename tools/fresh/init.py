"""First process of a fresh machine: mounts file systems, runs one command, and reaps processes.

    init.py ROOT DIRECTORY COMMAND

It starts in mount and PID namespaces of its own. Therefore its mounts are not visible outside, and
its end ends all processes and mounts. DIRECTORY is the working directory in ROOT; COMMAND is run by
the shell there.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "kvm")
_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def _mount(kind: str, target: Path, options: str = "nosuid") -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, kind, target], check=True)


def _populate(root: Path) -> None:
    _mount("proc", root / "proc")
    subprocess.run(["mount", "--rbind", "/sys", root / "sys"], check=True)
    devices = root / "dev"
    _mount("tmpfs", devices, "mode=755,nosuid")
    for name in _DEVICES:
        if os.path.exists(f"/dev/{name}"):
            (devices / name).touch()
            subprocess.run(["mount", "--bind", f"/dev/{name}", devices / name], check=True)
    _mount("devpts", devices / "pts", "newinstance,ptmxmode=0666,mode=620,gid=5")
    _mount("tmpfs", devices / "shm", "mode=1777,nosuid,nodev")
    for name, target in _LINKS.items():
        (devices / name).symlink_to(target)


def _become_root(root: Path) -> None:
    # A root that is only a directory, as after chroot() alone, is no place for mount namespaces of
    # its own: unshare(1) could not change how its mounts propagate.
    subprocess.run(["mount", "--bind", root, root], check=True)
    _populate(root)
    os.chdir(root)
    subprocess.run(["mount", "--move", ".", "/"], check=True)
    os.chroot(".")


def _execute(directory: str, command: str) -> NoReturn:
    os.chdir(directory)
    os.execv("/bin/sh", ["sh", "-c", command])


def main(root: Path, directory: str, command: str) -> int:
    """Run a command; return its exit status, or 128 plus the number of the signal that ended it.

    Args:
        root: root file system.
        directory: working directory, in `root`.
        command: shell command.
    """
    _become_root(root)
    child = os.fork()
    if child == 0:
        _execute(directory, command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the shell that runs here
    while True:  # orphans of the whole namespace are this process's children
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:4]))
