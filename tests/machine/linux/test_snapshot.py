"""A Linux guest is saved in the middle of its work, and a new process goes on with it."""

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rigs.initramfs import KERNEL, LINE, initramfs
from tests.rigs.needs import need_hardware

pytestmark = [pytest.mark.kvm, pytest.mark.linux("6.12")]

_BOOTS = """\
import os, sys, threading, time
from pathlib import Path
from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.machine import LinuxMachine

kernel, initrd, line, folder = sys.argv[1:]
config = MachineConfig(
    Path(kernel), unpack=False, command_line=line, initrds=(Path(initrd),), memory=128 << 20, cpus=2
)
with Kvm() as kvm, LinuxMachine(kvm, config, 1) as machine:
    runs = threading.Thread(target=machine.run)
    runs.start()
    end = time.monotonic() + 400
    while b"number 07" not in machine.serial.tail() and time.monotonic() < end:
        time.sleep(0.2)
    machine.pause()
    said = machine.serial.tail()
    time.sleep(1)
    assert machine.serial.tail() == said, "it runs while it is paused"
    machine.resume()
    while machine.serial.tail() == said and time.monotonic() < end:
        time.sleep(0.2)
    begun = time.monotonic()
    machine.pause()
    size = machine.snapshot(Path(folder))
    print(f"saved {size >> 10} KiB in {time.monotonic() - begun:.1f} s", file=sys.stderr)
    machine.stop()
    runs.join()
"""

_GOES_ON = """\
import sys, threading, time
from pathlib import Path
begun = time.monotonic()
from pykvm.kvm import Kvm
from pykvm.machine.linux.machine import LinuxMachine

imported = time.monotonic()
with Kvm() as kvm, LinuxMachine.restore(kvm, Path(sys.argv[1]), 1) as machine:
    restored = time.monotonic()

    def answer():
        # Not before: the terminal's echo would be in the middle of what the guest says.
        while b" seconds" not in machine.serial.tail() or not machine.serial.feed(b"hi\\n"):
            time.sleep(0.2)

    threading.Thread(target=answer, daemon=True).start()
    print(machine.run().value, file=sys.stderr)
    print(f"imported in {imported - begun:.1f} s, restored in {restored - imported:.1f} s, "
          f"ran {time.monotonic() - restored:.1f} s", file=sys.stderr)
"""


def run(script: str, *arguments: str) -> tuple[str, str]:
    """Run a script; return what the guest has said, and what the script has."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=500,
    )
    sys.stderr.write(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_new_process_goes_on(tmp_path: Path) -> None:
    """It counts, on two processors, without losing or repeating a number; its clock is right."""
    need_hardware("Linux guests")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initramfs())
    # At this level a kernel says that it has drawn new random numbers.
    line = f"console=ttyS0 {LINE} loglevel=6 -- count time echo poweroff"
    folder = tmp_path / "snapshot"
    before, _ = run(_BOOTS, str(KERNEL), str(initrd), line, str(folder))
    assert "init: 02 processors" in before, before
    size = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    assert size < 128 << 20, f"{size} bytes on disk"
    initrd.unlink()
    begun = time.time()
    after, told = run(_GOES_ON, str(folder))
    # The kernel's messages may come in the middle of a line of the program's.
    lines = re.sub(r"\[ *\d+\.\d+\] .*\n", "", before + after).splitlines()
    said = [line for line in lines if line.startswith("init: number")]
    assert said == [f"init: number {number:02}" for number in range(50)], before + after
    assert "init: number 49" in after
    (clock,) = [line for line in lines if line.endswith(" seconds")]
    assert begun - 2 < int(clock.split()[1]) < time.time() + 2, (begun, clock, time.time())
    assert "init: got hi" in after
    # Only the newer of Debian's kernels has a driver for the generation id.
    forked = "crng reseeded due to virtual machine fork" in after
    assert forked == (not platform.release().startswith("6.1.")), after
    assert told.startswith("power off\n"), told
