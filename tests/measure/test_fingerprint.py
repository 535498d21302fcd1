"""The machine's fingerprint: complete, serializable, and without its owner's identity."""

import getpass
import json
import platform
import socket
from pathlib import Path

import pytest

from pykvm.host.emulation import host_kind
from pykvm.host.processor import read_processor
from pykvm.kernel import modules
from pykvm.measure.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.unit
def test_it_says_what_numbers_depend_on() -> None:
    found = json.loads(json.dumps(fingerprint()))
    processor = read_processor()
    assert found["cpu"] == processor.name
    assert found["cpu_microcode"] == processor.microcode
    assert found["kernel"] == platform.release()
    assert found["kvm"] == modules.status().state
    assert found["pykvm"] == "0.1.0"
    assert found["host"] in ("emulated", "hardware")


@pytest.mark.unit
def test_it_names_nobody() -> None:
    text = json.dumps(fingerprint())
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    # A machine's name may be a word that the fingerprint uses anyway ("vm", "amd").
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text


@pytest.mark.unit
def test_the_testbed_is_told_by_its_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_TESTBED", "1")
    assert host_kind() == fingerprint()["host"] == "emulated"
    monkeypatch.delenv("PYKVM_TESTBED")
    assert host_kind() == fingerprint()["host"] == "hardware"


@pytest.mark.elisa
def test_the_patched_modules_are_identified() -> None:
    found = fingerprint()
    assert found["kvm"] == "patched"
    assert found["kvm_elisa"] > 0
    assert all(found["kvm_srcversion"].values())
