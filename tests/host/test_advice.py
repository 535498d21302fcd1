"""Advice names only packages that apt has, and modules that the kernel has."""

import os
import platform
from pathlib import Path

import pytest

from pykvm.host import advice, debian_packages
from tests.rigs import apt

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_packages_that_apt_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["xorriso", "kmod"])
    assert advice.install(["kmod", "xorriso", "kmod"]) == (
        "apt-get install --no-install-recommends kmod xorriso"
    )
    assert advice.install(["kmod"], again=True) == "apt-get install --reinstall kmod"


def test_packages_that_apt_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["xorriso"])
    assert advice.install(["xorriso", "linux-headers-6.18.0"], "boot another") == "boot another"
    assert "apt-get" not in advice.install(["linux-headers-6.18.0"])


def test_a_package_of_which_apt_has_the_source_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer(tmp_path, monkeypatch, apt.line("linux-source-6.12", kind="Sources"))
    assert advice.install(["linux-source-6.12"], "boot another") == "boot another"


def test_apt_without_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt.offer_packages(tmp_path, monkeypatch, [])
    monkeypatch.setattr(debian_packages, "_APT_LISTS", tmp_path / "none")
    assert advice.install(["kmod"]).startswith("apt-get update, then: apt-get install ")


def test_no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    assert advice.install(["kmod"]) == "install what Debian has in: kmod"


def test_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "_MODULES", tmp_path)
    assert advice.load_module("msr", "use another") == "use another"  # no modules at all
    directory = tmp_path / platform.release()
    directory.mkdir()
    (directory / "modules.dep").write_text(
        "kernel/arch/x86/kvm/kvm-intel.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz\nextra/vmsr.ko:\n"
    )
    assert advice.load_module("kvm_intel", "use another") == "modprobe kvm_intel"
    assert advice.load_module("kvm", "use another") == "use another"
    assert advice.load_module("msr", "use another") == "use another"
