"""Command line of `pykvm testbed`, without starting the emulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm.kernel.series import KernelMissingError, default_series, newest_kernel, offered_series

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
        newest_kernel()
    except KernelMissingError as error:
        pytest.skip(str(error))


def _plan(*arguments: str) -> dict[str, str]:
    done = _pykvm("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    pairs = (line.split(":", 1) for line in done.stdout.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_dry_run_says_what_would_be_done() -> None:
    _need_headers()
    lines = _plan("--stock", "--", "echo", "a b")
    assert lines["kernel"] == f"Linux {newest_kernel().release} (series {default_series()})"
    assert "bochs-bin" in lines["emulator"]
    assert lines["modules"] == "the distribution's KVM"
    assert lines["command"] == "echo 'a b'"


def test_each_series_is_a_host_of_its_own() -> None:
    _need_headers()
    plans = {series: _plan("--series", series, "--", "true") for series in offered_series()}
    for series, plan in plans.items():
        assert plan["kernel"].startswith(f"Linux {series}.")
        assert plan["kernel"].endswith(f"(series {series})")
    keys = {plan["host"].split(",")[0] for plan in plans.values()}
    assert len(keys) == len(plans)


def test_unknown_series_is_refused() -> None:
    done = _pykvm("--series", "5.10", "--", "true")
    assert done.returncode == 2
    assert "6.1, 6.12" in done.stderr.replace("'", "")


def test_further_patches_are_for_the_patched_modules(tmp_path: Path) -> None:
    _need_headers()
    lines = _plan("--also", "a.patch", "--also", "b.patch", "--", "true")
    assert lines["modules"] == "the patched KVM with a.patch with b.patch"
    for other in (["--stock"], ["--no-kvm"], ["--modules", str(tmp_path)]):
        done = _pykvm("--also", "a.patch", *other, "--", "true")
        assert done.returncode == 1
        assert "--also goes with the patched modules" in done.stderr


def test_further_patch_that_is_not_there() -> None:
    _need_headers()
    done = _pykvm("--also", "/no/such.patch", "--", "true")
    assert done.returncode == 1
    assert "cannot read the patch /no/such.patch (No such file or directory)" in done.stderr


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
    assert done.stderr == "pykvm: --env NAME sets no variable: write NAME=VALUE\n"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_timeout_must_be_a_time(text: str) -> None:
    done = _pykvm("--timeout", text, "--", "true")
    assert done.returncode == 2
    assert "--timeout" in done.stderr


def test_path_outside_the_folder_is_refused() -> None:
    _need_headers()
    done = _pykvm("--no-kvm", "--bring", "/etc/passwd", "--", "true")
    assert done.returncode == 1
    assert f"/etc/passwd is outside {_CHECKOUT}: " in done.stderr


def test_directory_without_modules_is_refused(tmp_path: Path) -> None:
    _need_headers()
    done = _pykvm("--modules", str(tmp_path), "--", "true")
    assert done.returncode == 1
    assert f"{tmp_path} has no kvm.ko: name the directory that this prints: " in done.stderr


def test_folder_with_too_much_in_it_is_refused_before_anything_is_booted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((256 << 20) + 1)
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))  # there is nothing to resume
    done = _pykvm("--no-kvm", "--folder", str(tmp_path), "--", "true")
    assert done.returncode == 1
    assert done.stderr == (
        f"pykvm: {tmp_path} holds more than 256 MiB: "
        "start in the folder of your work, or name one with --folder DIR\n"
    )
