"""What `pykvm doctor` looks at, on the machine that runs the tests."""

import os
from pathlib import Path

import pytest

from pykvm import doctor as checks
from pykvm.doctor import EMULATED, HOST, Check
from pykvm.host.emulation import is_emulated
from pykvm.host.processor import read_processor
from pykvm.kernel import modules
from pykvm.testbed import requirements
from tests.rigs import apt


def _named(name: str) -> Check:
    (found,) = [check for check in checks.run_checks() if check.name == name]
    return found


@pytest.mark.unit
def test_every_check_says_what_it_found_and_what_to_do() -> None:
    found = checks.run_checks()
    assert len({(check.group, check.name) for check in found}) == len(found)
    assert {check.group for check in found} == ({HOST} if is_emulated() else {HOST, EMULATED})
    for check in found:
        assert check.found, check
        assert check.ok or check.next_step, check
        assert "\n" not in check.found + check.next_step


@pytest.mark.unit
def test_checks_agree_with_the_machine() -> None:
    processor = read_processor()
    assert _named("processor").ok == processor.is_intel
    assert processor.name in _named("processor").found
    assert _named("VMX").ok == processor.has_vmx
    assert _named("/dev/kvm").ok == os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert _named("patched KVM").ok == (modules.elisa_version() > 0)


@pytest.mark.unit
def test_the_host_is_usable_only_with_everything_it_needs() -> None:
    good = [Check(HOST, name, True, "x") for name in "abc"]
    assert checks.host_usable(good)
    assert checks.host_usable([*good, Check(HOST, "d", False, "x", "y", needed=False)])
    assert checks.host_usable([*good, Check(EMULATED, "d", False, "x", "y")])
    assert not checks.host_usable([*good, Check(HOST, "d", False, "x", "y")])
    assert not checks.emulated_host_usable(good)  # nothing was looked at
    assert checks.emulated_host_usable([Check(EMULATED, "a", True, "x")])
    assert not checks.emulated_host_usable([Check(EMULATED, "a", False, "x", "y")])


@pytest.mark.unit
@pytest.mark.skipif(is_emulated(), reason="there is no emulated host inside the emulated host")
def test_missing_tools_are_named_with_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_PROGRAMS", {"no-such-bochs": "bochs", "sh": "dash"})
    monkeypatch.setattr(requirements, "_FILES", {str(tmp_path / "BIOS"): "bochsbios"})
    apt.offer_packages(tmp_path, monkeypatch, ["bochs", "bochsbios"])
    check = _named("Bochs and tools")
    assert not check.ok
    assert check.found == f"not installed: no-such-bochs, {tmp_path / 'BIOS'}"
    assert check.next_step.endswith("apt-get install --no-install-recommends bochs bochsbios")


@pytest.mark.elisa
def test_this_host_runs_elisa() -> None:
    lacking = [check for check in checks.run_checks() if check.group == HOST and not check.ok]
    assert [check for check in lacking if check.needed] == []
    assert _named("VMFUNC with EPTP switching").ok
    assert "ELISA version" in _named("patched KVM").found
