"""`pykvm run`: what it is asked for, and what it refuses before anything runs."""

import platform
from pathlib import Path

import pytest

from pykvm.cli.main import main
from pykvm.machine.linux.config import MachineConfig, MachineConfigError
from pykvm.sizes import GIB, MIB
from tests.rigs.kernel_files import elf

pytestmark = pytest.mark.unit


def test_what_would_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kernel", "vmlinuz", "--unpack", "--initrd", "disk", "--append", "quiet"]
    assert main(["run", "--dry-run", *options, "--cpus", "2", "--memory", "1G"]) == 0
    assert capsys.readouterr().out == (
        "kernel    vmlinuz (unpacked here, PVH)\n"
        "initrd    disk\n"
        "append    console=ttyS0 quiet\n"
        "cpus      2\n"
        "memory    1024 MiB\n"
    )
    assert main(["run", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"kernel    /boot/vmlinuz-{platform.release()} (as it is)" in said
    assert said.endswith("root      / (what is written is gone afterwards)\ncommand   /bin/sh -i\n")


def test_a_command_that_would_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", "/srv/debian", "--share", "data=/srv/data,rw"]
    assert main(["run", "--dry-run", *options, "--", "printf", "%s", "a b"]) == 0
    said = capsys.readouterr().out
    assert "share     data: /srv/data (writable)\n" in said
    assert "root      /srv/debian (what is written is gone afterwards)\n" in said
    assert said.endswith("command   printf %s 'a b'\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--initrd", "x", "--", "true"], "--initrd goes with neither a command nor --root"),
        (["--initrd", "x", "--root", "/"], "--initrd goes with neither a command nor --root"),
        (["--share", "data"], "'data' is no shared directory: write --share TAG=DIRECTORY"),
        (["--share", "=/srv"], "is no shared directory"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--dry-run", *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64 * MIB), ("512M", 512 * MIB), ("2g", 2 * GIB), ("65536K", 64 * MIB)]
)
def test_sizes(text: str, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", "--memory", text]) == 0
    assert f"memory    {size >> 20} MiB" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "M", "1T", "-", "0x10", "1.5G", "many"])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--memory", text])
    assert caught.value.code == 2
    assert "write a size like 512M or 2G" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cpus", "0"], "0 processors: use 1 to 64"),
        (["--cpus", "65"], "65 processors: use 1 to 64"),
        (["--memory", "1M"], "use 64 MiB or more"),
        (["--memory=-1G"], "use 64 MiB or more"),
    ],
)
def test_machines_that_cannot_be(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--dry-run", *options]) == 1
    assert said in capsys.readouterr().err


def test_memory_in_parts_of_pages() -> None:
    with pytest.raises(MachineConfigError, match="whole pages"):
        MachineConfig(Path("vmlinuz"), memory=64 * MIB + 1)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernel", "none"], "none cannot be read: No such file or directory"),
        (["--kernel", "."], "is no regular file"),
        (["--kernel", "text"], "text does not say its release: give a bzImage"),
        (["--initrd", "small", "--kernel", "text"], "text is of an unknown kind, not a kernel"),
        (["--initrd", "none"], "none cannot be read: No such file or directory"),
        (["--initrd", "empty"], "empty has 0 bytes, which do not fit behind the kernel"),
        (["--initrd", "large"], "which do not fit behind the kernel: give the guest more memory"),
        (
            ["--initrd", "small", "--append", "x" * 3000],
            "a command line of 3014 bytes, kernel takes 2047",
        ),
        (["--initrd", "small", "--memory", "999999G"], "do not fit into"),
    ],
)
def test_files_that_cannot_be_used(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kernel").write_bytes(elf([(16 * MIB, b"x", 4096)]))
    Path("text").write_text("text\n")
    Path("empty").touch()
    Path("small").write_text("small")
    with open("large", "wb") as file:
        file.truncate(100 * MIB)
    assert main(["run", "--kernel", "kernel", "--memory", "64M", *options]) == 1
    error = capfd.readouterr().err
    assert error.startswith("pykvm: ")
    assert error.count("\n") == 1
    assert said in error
