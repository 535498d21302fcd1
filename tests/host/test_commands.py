"""Commands in messages can be typed as they are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm.host import commands

pytestmark = pytest.mark.unit


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a program pykvm in a directory with a space that is not in PATH."""
    path = tmp_path / "my env" / "bin" / "pykvm"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(path), "kernel", "load", "--modules", "a b"])
    monkeypatch.setenv("PATH", "/none")
    return path


def test_by_name_where_the_shell_finds_it(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(commands.program()) == [str(called)]
    monkeypatch.setenv("PATH", str(called.parent))
    assert commands.program() == "pykvm"
    other = called.parents[2] / "pykvm"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert shlex.split(commands.program()) == [str(called)]


def test_as_root(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert commands.as_root("modprobe msr") == "modprobe msr"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert commands.as_root("modprobe msr") == "su -c 'modprobe msr'"
    sudo = called.with_name("sudo")
    sudo.write_text("#!/bin/sh\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", str(called.parent))
    assert commands.as_root("modprobe msr") == "sudo modprobe msr"
    # sudo would search its own path for "pykvm".
    assert commands.program() == "pykvm"
    assert shlex.split(commands.again_as_root()) == ["sudo", *sys.argv]


def test_a_program_that_imports_pykvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert commands.program() == "pykvm"
    assert commands.again_as_root() == "run this program as root"
    assert commands.emulated_host() == "use the emulated host: pykvm testbed -- COMMAND"


def test_as_a_module() -> None:
    script = "from pykvm.host import commands; print(commands.program())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = '/x/pykvm/__main__.py'; {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shlex.split(done.stdout) == [sys.executable, "-m", "pykvm"]
