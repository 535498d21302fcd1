"""Checks of `pykvm doctor` on the machine that runs the tests."""

import dataclasses
import grp
import os
import pwd
import shutil
from pathlib import Path

import pytest

from pykvm import doctor
from pykvm.doctor import EMULATED, HOST, Check
from pykvm.host.emulation import is_emulated
from pykvm.host.processor import read_processor
from pykvm.kernel import modules
from pykvm.kernel import packages as kernel_packages
from pykvm.testbed import requirements
from tests.rigs import apt


def _named(name: str) -> Check:
    (found,) = [check for check in doctor.run_checks() if check.name == name]
    return found


@pytest.mark.unit
def test_every_check_says_what_it_found_and_what_to_do() -> None:
    found = doctor.run_checks()
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
    assert doctor.host_usable(good)
    assert doctor.host_usable([*good, Check(HOST, "d", False, "x", "y", needed=False)])
    assert doctor.host_usable([*good, Check(EMULATED, "d", False, "x", "y")])
    assert not doctor.host_usable([*good, Check(HOST, "d", False, "x", "y")])
    assert not doctor.emulated_host_usable(good)  # none of the checks was made
    assert doctor.emulated_host_usable([Check(EMULATED, "a", True, "x")])
    assert not doctor.emulated_host_usable([Check(EMULATED, "a", False, "x", "y")])


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


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> str:
    """Become an ordinary user with sudo; return the name."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    entry = pwd.struct_passwd(("me", "x", 1000, 1000, "", "/home/me", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    return entry.pw_name


@pytest.mark.unit
@pytest.mark.parametrize(
    ("mode", "group", "members", "step"),
    [
        (0o660, 107, [], "sudo usermod -aG kvm me, then log in again"),
        (0o660, 107, ["me"], "log in again: me has become a member of kvm meanwhile"),
        (0o600, 107, [], "sudo pykvm COMMAND"),  # no group may use it
        (0o660, 0, [], "sudo pykvm COMMAND"),  # root's own group, which no user should join
    ],
)
def test_no_permission_for_kvm(
    mode: int,
    group: int,
    members: list[str],
    step: str,
    user: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(doctor, "_KVM", device)
    entry = grp.struct_group(("kvm", "x", group, members))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: entry)
    assert doctor._permission_step() == step


@pytest.mark.unit
def test_a_user_without_an_entry_joins_no_group(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(doctor, "_KVM", tmp_path)
    assert doctor._permission_step() == "sudo pykvm COMMAND"


@pytest.mark.unit
def test_settings_that_forbid_namespaces_are_named_if_they_do(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SYSCTL", tmp_path)
    assert doctor._namespaces_step() == "sudo pykvm testbed -- COMMAND"  # no such settings here
    for setting, value in (("kernel/unprivileged_userns_clone", 0), ("user/max_net_namespaces", 9)):
        (tmp_path / setting).parent.mkdir()
        (tmp_path / setting).write_text(f"{value}\n")
    assert doctor._namespaces_step() == "sudo sysctl kernel.unprivileged_userns_clone=1"
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("1\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "CAP_SYS_ADMIN" in doctor._namespaces_step()


@pytest.mark.unit
def test_a_kernel_that_there_is_no_patch_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["linux-headers-6.18.44", "linux-source-6.18"])
    monkeypatch.setattr(kernel_packages, "running_release", lambda: "6.18.44")
    check = _named("headers and source of the running kernel")
    assert check.found.startswith("no KVM patch for Linux 6.18, only for: 6.1, 6.12")
    assert "apt-get" not in check.next_step  # installing it would not help
    assert "pykvm testbed -- COMMAND" in check.next_step


@pytest.mark.unit
@pytest.mark.parametrize("buildable", [True, False])
def test_modules_are_to_be_loaded_where_they_can_be_built(
    buildable: bool, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmx = dataclasses.replace(read_processor(), flags=frozenset(["vmx"]))
    monkeypatch.setattr(doctor, "read_processor", lambda: vmx)
    monkeypatch.setattr(modules, "status", lambda: modules.Status("stock", 0, {}, []))
    packages = Check(HOST, "packages", buildable, "x", "y", needed=False)
    monkeypatch.setattr(doctor, "_kernel_packages", lambda: packages)
    step = doctor._kvm().next_step
    if buildable:
        assert step == "pykvm kernel build && sudo pykvm kernel load"
    else:
        assert step == "use the emulated host: pykvm testbed -- COMMAND"


@pytest.mark.unit
@pytest.mark.skipif(is_emulated(), reason="there is no emulated host inside the emulated host")
def test_a_cache_that_cannot_be_written_is_not_blamed_on_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(kernel_packages, "installed_headers", lambda: [])
    check = _named("kernel series (--series)")
    assert check.found.startswith(f"cannot write the cache at {tmp_path / 'file' / 'cache'} ")
    assert check.next_step == "set PYKVM_CACHE to a directory that you may write"


@pytest.mark.elisa
def test_this_host_runs_elisa() -> None:
    lacking = [check for check in doctor.run_checks() if check.group == HOST and not check.ok]
    assert [check for check in lacking if check.needed] == []
    assert _named("VMFUNC with EPTP switching").ok
    assert "ELISA version" in _named("patched KVM").found
