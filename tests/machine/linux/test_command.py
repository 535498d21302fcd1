"""pykvm.machine.linux.command: what a guest is told to run, and what it tells."""

import platform
from pathlib import Path

import pytest

from pykvm.machine.linux.command import (
    Command,
    CommandError,
    GuestFailedError,
    exit_status,
    shared_environment,
)
from tests.rigs.needs import need_hardware


@pytest.mark.unit
def test_settings() -> None:
    command = Command(
        ["printf", "%s\n", "a b"], "virtiofs:root", environment={"A": "b=c"}, directory="/srv"
    )
    assert command.settings() == (
        b"root=virtiofs:root\0directory=/srv\0name=pykvm\0terminal=0\0"
        b"word=printf\0word=%s\n\0word=a b\0environment=A=b=c\0overlay=mode=755\0"
    )
    assert b"overlay" not in Command(["true"], "ext4:/dev/vda", writable=True).settings()


@pytest.mark.unit
def test_names_that_are_no_text() -> None:
    assert b"word=\xff\xfe\0" in Command(["cat", "\udcff\udcfe"], "virtiofs:root").settings()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "an empty command: name a program"),
        ([""], "an empty command"),
        (["a\0b"], "a zero byte"),
        (["a"] * 4097, "a command of 4097 words"),
        (["a" * (2 << 20)], "use at most 4096 words and 2 MiB"),
    ],
)
def test_commands_that_cannot_be_handed_over(words: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        Command(words, "virtiofs:root").settings()


@pytest.mark.unit
def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent")
    shared = shared_environment()
    assert shared["TERM"] == "xterm"
    assert "/usr/bin" in shared["PATH"]
    assert "SSH_AUTH_SOCK" not in shared


@pytest.mark.unit
@pytest.mark.parametrize(
    ("told", "status"), [(b"exit 0\n", 0), (b"exit 255\n", 255), (b"signal 9\n", 137)]
)
def test_how_it_ended(told: bytes, status: int) -> None:
    assert exit_status(told) == status


@pytest.mark.unit
@pytest.mark.parametrize(
    "told", [b"", b"exit", b"exit 256\n", b"exit -1\n", b"signal 99\n", b"\xff"]
)
def test_a_guest_that_says_nothing_useful(told: bytes) -> None:
    with pytest.raises(GuestFailedError, match="ended without telling"):
        exit_status(told)


@pytest.mark.unit
def test_a_guest_that_failed() -> None:
    with pytest.raises(GuestFailedError, match="the guest failed: mount of /lower: No such device"):
        exit_status(b"failed mount of /lower: No such device\n")


@pytest.mark.kvm
@pytest.mark.linux
def test_initial_ram_disks(tmp_path: Path) -> None:
    need_hardware("Linux guests")
    kernel = Path(f"/boot/vmlinuz-{platform.release()}")
    disks = Command(["true"], "virtiofs:root").initrds(kernel, tmp_path)
    assert [disk.name for disk in disks] == ["init.cpio", "modules.cpio", "settings.cpio"]
    assert all(disk.stat().st_size % 4 == 0 for disk in disks)
    assert b"modules/000-" in disks[1].read_bytes()[:4096]
