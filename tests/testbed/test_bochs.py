"""The emulator's configuration and command line."""

from pathlib import Path

import pytest

from pykvm.testbed import bochs

pytestmark = pytest.mark.unit


def test_every_path_of_the_configuration_is_of_the_instance_or_the_distribution() -> None:
    for line in bochs.configuration().splitlines():
        for field in line.split(": ", 1)[1].split(", "):
            name, _, value = field.partition("=")
            if name in {"path", "dev", "file"}:
                assert "/" not in value or value.startswith("/usr/share/bochs/"), line


def test_the_counter_advances_by_one_an_instruction() -> None:
    assert "clock: sync=none" in bochs.configuration()
    assert "model=corei7_skylake_x" in bochs.configuration()


def test_the_emulator_has_namespaces_of_its_own() -> None:
    command = bochs.emulator_command(Path("/state"))
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
