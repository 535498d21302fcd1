"""`pykvm run -- COMMAND`: a command in a Linux guest that sees the host's files, as a local one."""

import os
import platform
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.programs import build_program
from tests.rigs.needs import need_hardware


@pytest.mark.unit
def test_the_first_process_can_be_made() -> None:
    """Building it fills the cache for the emulated host."""
    program = build_program("guest-program", GUEST_SOURCES / "linux" / "init.c")
    assert program.read_bytes().startswith(b"\x7fELF")


SCRIPT = """
uname -r
pwd
cat
echo "$LANG" >&2
cat "$0" > /dev/null && echo changed > "$0" && cat "$0"
exit 7
"""


@pytest.mark.kvm
@pytest.mark.linux
def test_a_command_runs_as_a_local_one() -> None:
    """Streams, directory, environment and status; what it writes is gone afterwards."""
    need_hardware("Linux guests")
    # Directories of tests are below /tmp, where a guest has its own: the file is in the checkout.
    inside = Path.cwd() / "build" / "seen by a guest"
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("unchanged\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pykvm", "run", "--memory", "200M"),
            *("--", "sh", "-c", SCRIPT, str(inside)),
        ],
        input="given\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "LANG": "xx_YY"},
    )
    assert done.stdout == f"{platform.release()}\n{Path.cwd()}\ngiven\nchanged\n"
    assert done.stderr == "xx_YY\n"
    assert done.returncode == 7
    assert inside.read_text() == "unchanged\n"


@pytest.mark.kvm
@pytest.mark.linux("6.1")
def test_a_shell_on_a_terminal() -> None:
    """Keys reach the guest, the terminal has a size there, and the escape ends it."""
    need_hardware("Linux guests")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 90))
    command = [sys.executable, "-m", "pykvm", "run", "--memory", "200M"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""

    def shows(text: bytes) -> None:
        nonlocal said
        while text not in said:
            assert select.select([ours], [], [], 400)[0], said
            said += os.read(ours, 4096)

    try:
        shows(b"# ")
        os.write(ours, b"stty size; echo $((6 * 7)) answer\n")
        shows(b"40 90")
        shows(b"42 answer")
        os.write(ours, b"sleep 1000\n\x03")
        os.write(ours, b"echo still $((1 + 1))\n")
        shows(b"still 2")
        os.write(ours, b"\x1d")
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
