"""A Linux guest: its kernel, its initial RAM disk, and its console here."""

import sys
from pathlib import Path

from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.machine import LinuxMachine

kernel, initrd, line = sys.argv[1:]
config = MachineConfig(
    kernel=Path(kernel), initrds=(Path(initrd),), command_line=line, memory=192 << 20
)
with Kvm() as kvm, LinuxMachine(kvm, config, output=1) as machine:
    print(machine.run())
