"""The emulator's configuration and command line."""

import time
from pathlib import Path

import pytest

from pykvm.testbed import bochs
from pykvm.testbed.bochs import CPUS, DEFAULT_CPU, Emulator, Machine
from pykvm.testbed.bochs_installation import Installation

pytestmark = pytest.mark.unit

PLAIN = Installation("1.0-1", ("bochs-bin",), Path("/usr/share/bochs"))


@pytest.mark.parametrize("cpu", CPUS)
def test_every_path_of_the_configuration_is_of_the_instance_or_the_distribution(cpu: str) -> None:
    for line in Machine(cpu, PLAIN).configuration().splitlines():
        for field in line.split(": ", 1)[1].split(", "):
            name, _, value = field.partition("=")
            if name in {"path", "dev", "file"}:
                assert "/" not in value or value.startswith("/usr/share/bochs/"), line


@pytest.mark.parametrize("cpu", CPUS)
def test_the_counter_advances_by_one_an_instruction(cpu: str) -> None:
    configuration = Machine(cpu, PLAIN).configuration()
    assert "clock: sync=none" in configuration
    assert f"cpu: model={cpu}, " in configuration


def test_the_emulator_has_namespaces_of_its_own() -> None:
    command = Machine(DEFAULT_CPU, PLAIN).command(Path("/state"))
    assert command[command.index("bochs-bin") :][-2:] == ["-r", "/state"]
    for option in ("--net", "--pid", "--kill-child=KILL"):
        assert option in command[: command.index("bochs-bin")]


def test_saved_configuration_loads_usb_where_a_fresh_start_does(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "plugin_ctrl: biosdev=true, usb_uhci=true, iodebug=true\n"
        "boot: disk\n"
        "usb_uhci: enabled=1, port1=none\n"
    )
    bochs.make_restorable(tmp_path)
    assert config.read_text() == "plugin_ctrl: biosdev=true, iodebug=true\nboot: disk\n"


@pytest.mark.testbed
def test_a_boot_is_limited_by_the_emulators_own_time(tmp_path: Path) -> None:
    busy = 'case "$*" in *--help*) exit;; esac; while :; do :; done'
    machine = Machine(DEFAULT_CPU, Installation("1.0-1", ("sh", "-c", busy), PLAIN.share))
    with Emulator(tmp_path, machine) as emulator:
        while emulator.running() and emulator.processor_time() < 0.05:
            time.sleep(0.01)
        assert emulator.running()
