"""Debian's kernel boots in a machine of pykvm, talks on its console, and ends it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm.machine.linux.boot import BootInfo, MemoryKind, MemoryRange
from pykvm.machine.linux.pvh import start_info
from tests.rigs.initramfs import KERNEL, LINE, init_program, initramfs
from tests.rigs.needs import need_hardware


@pytest.mark.unit
def test_the_first_process_can_be_made() -> None:
    """Building it fills the cache for the emulated host."""
    assert init_program().startswith(b"\x7fELF")


@pytest.mark.unit
def test_what_pvh_tells() -> None:
    ranges = [MemoryRange(0, 4096, MemoryKind.RAM), MemoryRange(4096, 8192, MemoryKind.ACPI)]
    info = start_info(0x6000, BootInfo(ranges, 0x20000, 0xE0000, (0x700000, 99)))
    words = [int.from_bytes(info[at : at + 8], "little") for at in range(0, len(info), 8)]
    assert words[0] == 1 << 32 | 0x336EC578  # version, magic
    assert words[1] == 1 << 32  # a module, no flags
    assert words[2:5] == [0x6000 + 56, 0x20000, 0xE0000]
    assert words[5:7] == [0x6000 + 56 + 32, 2]
    assert words[7:11] == [0x700000, 99, 0, 0]
    assert words[11:] == [0, 4096, 1, 4096, 8192, 3]


def boot(directory: Path, *options: str, words: str, given: str = "") -> tuple[int, str]:
    """Run a machine; return its exit status and everything that it and the guest have said."""
    need_hardware("Linux guests")
    assert KERNEL.exists(), "the emulated host has its kernel in /boot"
    initrd = directory / "initrd"
    initrd.write_bytes(initramfs())
    command = [sys.executable, "-m", "pykvm", "run", "--initrd", str(initrd), *options]
    done = subprocess.run(
        [*command, "--memory", "160M", "--append", f"{LINE} -- {words}"],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=500,
    )
    return done.returncode, done.stdout


@pytest.mark.kvm
@pytest.mark.linux
def test_it_boots_talks_and_ends(tmp_path: Path) -> None:
    """By PVH with two processors to power-off, or by the 64-bit protocol with one to a reset.

    One boot for each series of the host's kernel, because it takes a minute on the emulated host.
    """
    by_pvh = platform.release().startswith("6.1.")
    options = ["--unpack", "--cpus", "2"] if by_pvh else ["--no-reboot"]
    status, said = boot(
        tmp_path, *options, words="echo poweroff" if by_pvh else "echo reboot", given="hi\n"
    )
    assert f"init: {'02' if by_pvh else '01'} processors" in said, said
    assert "init: got hi" in said
    assert "init: ends" not in said
    assert status == 0, said


@pytest.mark.kvm
@pytest.mark.linux("6.1")
def test_the_example_tells_a_panic(tmp_path: Path) -> None:
    """The first process ends, and no driver for pvpanic is there yet."""
    need_hardware("Linux guests")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initramfs())
    example = Path(__file__).parents[3] / "examples" / "linux.py"
    done = subprocess.run(
        [sys.executable, example, KERNEL, initrd, f"console=ttyS0 {LINE} -- end"],
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        timeout=500,
    )
    assert "init: ends" in done.stdout
    assert "Kernel panic - not syncing: Attempted to kill init!" in done.stdout
    assert done.stdout.endswith("End.PANIC\n")
    assert done.returncode == 0
