"""Debian's kernel boots in a process that has entered a sandbox before the first vCPU runs."""

import os
import platform
import threading
from pathlib import Path

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.console import Console
from pykvm.machine.linux.machine import End, LinuxMachine
from pykvm.sandbox import Confinement, available, enter
from tests.rigs.confined import in_child
from tests.rigs.initramfs import initramfs
from tests.rigs.needs import need_hardware
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

KERNEL = Path("/boot") / f"vmlinuz-{platform.release()}"
SECONDS = 500


def test_it_boots_talks_and_ends(tmp_path: Path) -> None:
    """It is saved meanwhile, into the only directory that the process may write to.

    One boot is enough: on a host of another series, every layer must be there.
    """
    need_hardware("Linux guests")
    assert [str(layer) for layer in available() if not layer.in_force] == []
    if not platform.release().startswith("6.1."):
        return
    (tmp_path / "initrd").write_bytes(initramfs())
    for name in ("machine", "snapshots"):
        (tmp_path / name).mkdir()
    config = MachineConfig(
        kernel=KERNEL,
        initrds=(tmp_path / "initrd",),
        command_line="console=ttyS0 quiet cryptomgr.notests panic=-1 -- echo poweroff",
        memory=128 << 20,
        cpus=2,
    )
    confinement = Confinement(directory=tmp_path / "machine", writable=(tmp_path / "snapshots",))
    keys, typed = os.pipe()
    said = os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT, 0o600)

    def body() -> list[str]:
        ends: list[End] = []
        with (
            Kvm() as kvm,
            LinuxMachine(kvm, config, said) as machine,
            Console(machine.serial.feed, machine.stop, keys),
        ):
            applied = enter(confinement)
            assert applied.threads == 2, "the console's thread is there already"
            runs = threading.Thread(target=lambda: ends.append(machine.run()))
            runs.start()
            wait_for(lambda: b"02 processors" in machine.serial.tail(), SECONDS)
            machine.snapshot(tmp_path / "snapshots" / "booted")
            os.write(typed, b"hi\n")
            runs.join()
        with pytest.raises(PermissionError):
            KERNEL.read_bytes()
        assert ends == [End.POWER_OFF]
        (tmp_path / "machine" / "report").write_text("\n".join(applied.lines()))
        return [layer.name for layer in applied.layers if layer.in_force]

    try:
        layers = in_child(body, seconds=SECONDS)
    finally:
        text = (tmp_path / "said").read_text(errors="replace")
        print(text)
    assert layers == ["privileges", "landlock", "seccomp"]
    assert "init: got hi" in text
    assert (tmp_path / "snapshots" / "booted" / "memory").stat().st_size >= 128 << 20
    print((tmp_path / "machine" / "report").read_text())
