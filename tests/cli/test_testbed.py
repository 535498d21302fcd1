"""`pykvm testbed`: its command line, without starting the emulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm.testbed import KernelImageError, kernel_version

pytestmark = pytest.mark.unit

_CHECKOUT = Path(__file__).parents[2]


def _pykvm(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    program = "import sys; from pykvm.cli.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(_CHECKOUT)}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, "-c", program, "testbed", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _need_headers() -> None:
    try:
        kernel_version()
    except KernelImageError as error:
        pytest.skip(str(error))


def test_dry_run_says_what_would_be_done() -> None:
    _need_headers()
    done = _pykvm("--dry-run", "--stock", "--", "echo", "a b")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["kernel"].strip() == f"Linux {kernel_version()}"
    assert "bochs-bin" in lines["emulator"]
    assert lines["modules"].strip() == "the distribution's KVM"
    assert lines["command"].strip() == "echo 'a b'"


def test_options_after_the_command_are_the_commands() -> None:
    _need_headers()
    done = _pykvm("--dry-run", "--no-kvm", "--", "ls", "--stock", "--timeout")
    assert "command:  ls --stock --timeout" in done.stdout
    assert "modules:  no KVM" in done.stdout


def test_two_kinds_of_kvm_are_one_too_many() -> None:
    done = _pykvm("--stock", "--no-kvm", "--", "true")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


def test_malformed_variable_is_told() -> None:
    _need_headers()
    done = _pykvm("--no-kvm", "--env", "NAME", "--", "true")
    assert done.returncode == 1
    assert done.stderr == "pykvm: --env NAME: write NAME=VALUE\n"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_timeout_must_be_a_time(text: str) -> None:
    done = _pykvm("--timeout", text, "--", "true")
    assert done.returncode == 2
    assert "--timeout" in done.stderr


def test_path_outside_the_checkout_is_refused() -> None:
    _need_headers()
    done = _pykvm("--no-kvm", "--bring", "/etc/passwd", "--", "true")
    assert done.returncode == 1
    assert "/etc/passwd is outside the checkout" in done.stderr


def test_directory_without_modules_is_refused(tmp_path: Path) -> None:
    _need_headers()
    done = _pykvm("--modules", str(tmp_path), "--", "true")
    assert done.returncode == 1
    assert f"{tmp_path} has no kvm.ko; run: pykvm kernel build" in done.stderr
