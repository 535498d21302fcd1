"""`pykvm run -- COMMAND`: a command in a Linux guest that sees the host's files, as a local one."""

import os
import platform
import subprocess
import sys
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
