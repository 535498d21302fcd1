"""Two Linux guests use each other over virtio-net, and every byte that arrives is the right one."""

import subprocess

import pytest

from pykvm.cli.demo_linux import table
from pykvm.measure.linux_pair import KINDS, measure_pair
from tests.rigs.kernel_modules import load_inside
from tests.rigs.needs import need_hardware


@pytest.mark.kvm
@pytest.mark.linux("6.1")
def test_two_guests_use_each_other() -> None:
    need_hardware("Linux guests")
    load_inside("tun", "bridge", "vhost_net")
    found = measure_pair(5, "128M")
    assert list(found) == list(KINDS)
    for kind, result in found.items():
        assert result["right"] == result["sent"] > 0, kind
        assert len(result["each"]) == result["sent"]
        assert result["median"] > 0
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "pykvm" not in links  # bridge and TAPs are gone


@pytest.mark.unit
def test_table() -> None:
    kinds = {name: {"sent": 5, "right": 5, "cost": 1234.5} for name in KINDS}
    record = {
        "host": "emulated",
        "unit": "instructions",
        "data_plane": "vhost-net",
        "fingerprint": {},
        "kinds": kinds,
    }
    lines = table(record).splitlines()
    assert lines[0].split() == ["what", "sent", "right", "median", "instructions"]
    assert lines[2].endswith("     5      5                1,234")
    assert lines[-1] == "(frames by vhost-net)"
