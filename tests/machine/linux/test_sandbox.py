"""Debian's kernel boots in a process that has entered a sandbox before the first vCPU runs."""

import os
import platform
from pathlib import Path

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.console import Console
from pykvm.machine.linux.machine import End, LinuxMachine
from pykvm.sandbox import Confinement, enter
from tests.rigs.confined import in_child
from tests.rigs.initramfs import initramfs
from tests.rigs.needs import need_hardware

pytestmark = pytest.mark.kvm

KERNEL = Path("/boot") / f"vmlinuz-{platform.release()}"


def test_it_boots_talks_and_ends(tmp_path: Path) -> None:
    need_hardware("Linux guests")
    if not platform.release().startswith("6.1."):
        pytest.skip("one boot is enough, and this series takes longer")
    (tmp_path / "initrd").write_bytes(initramfs())
    (tmp_path / "machine").mkdir()
    config = MachineConfig(
        kernel=KERNEL,
        initrds=(tmp_path / "initrd",),
        command_line="console=ttyS0 quiet cryptomgr.notests panic=-1 -- echo poweroff",
        memory=160 << 20,
        cpus=2,
    )
    keys, typed = os.pipe()
    os.write(typed, b"hi\n")
    said = os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT, 0o600)

    def body() -> list[str]:
        with (
            Kvm() as kvm,
            LinuxMachine(kvm, config, said) as machine,
            Console(machine.serial, machine.stop, keys),
        ):
            applied = enter(Confinement(directory=tmp_path / "machine"))
            assert applied.threads == 2, "the console's thread is there already"
            assert machine.run() is End.POWER_OFF
        (tmp_path / "machine" / "report").write_text("\n".join(applied.lines()))
        with pytest.raises(PermissionError):
            KERNEL.read_bytes()
        return [layer.name for layer in applied.layers if layer.in_force]

    try:
        layers = in_child(body, seconds=500)
    finally:
        print((tmp_path / "said").read_text(errors="replace"))
    assert layers == ["privileges", "landlock", "seccomp"]
    text = (tmp_path / "said").read_text(errors="replace")
    assert "init: 02 processors" in text
    assert "init: got hi" in text
    print((tmp_path / "machine" / "report").read_text())
