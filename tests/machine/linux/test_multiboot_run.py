"""A Multiboot image like those of kvm-unit-tests runs in a machine of pykvm."""

import os
from pathlib import Path

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.machine import End, LinuxMachine
from pykvm.sizes import MIB
from tests.rigs.multiboot_image import image_32

pytestmark = pytest.mark.kvm


def test_it_runs_and_ends_with_a_status(tmp_path: Path) -> None:
    """It finds what it is told by memory and by ports, and ends its machine."""
    image = tmp_path / "image"
    image.write_bytes(image_32())
    module = tmp_path / "module"
    module.write_bytes(b"NR_CPUS=2\0")
    config = MachineConfig(
        kernel=image,
        command_line="quiet 21",
        initrds=(module,),
        memory=64 * MIB,
        cpus=2,
    )
    reader, writer = os.pipe()
    with Kvm() as kvm, LinuxMachine(kvm, config, writer) as machine:
        assert machine.run() is End.EXIT
        assert machine.exit_status == 43
    os.close(writer)
    with open(reader, encoding="ascii") as output:
        assert output.read().splitlines() == [
            "magic 2badb002",
            "flags 24d",
            "line image quiet 21",
            "loader pykvm",
            "lower 27f",
            "upper fc00",
            "range 0 9fc00 1",
            "range e0000 20000 3",
            "range 100000 3f00000 1",
            "range c0000000 100000 2",
            "module 0 c NR_CPUS=2",
            "cpus 2",
            "pci 111b36",
        ]
