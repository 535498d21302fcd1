"""Real exchanges of KVM's modules on the emulated host, and refusals where that is impossible."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm import doctor as checks
from pykvm.cli.main import main
from pykvm.host.emulation import is_emulated
from pykvm.host.processor import Processor
from pykvm.kernel import modules, weaknesses
from pykvm.kernel.weaknesses import Weak

# Each exchange takes seconds on the emulated host, so these tests make as few as they can.

PARAMETERS = Path("/sys/module")


@pytest.fixture
def patched() -> Iterator[modules.Status]:
    """Check that the patched modules are loaded, and load them again after the test."""
    if not is_emulated():
        pytest.skip("exchanging modules is for the emulated host, not for a machine in use")
    # Later tests need the patched modules: find them before changing anything.
    directory = Path(os.environ["PYKVM_MODULES"])
    assert (directory / "kvm.ko").is_file()
    before = modules.status()
    assert before.state == "patched"
    apicv = PARAMETERS / "kvm_intel/parameters/enable_apicv"
    usual = apicv.read_text()
    accepted = weaknesses.accepted()  # which the distribution's modules do not keep
    yield before
    if modules.status().state != "patched":
        modules.load(directory)
    if apicv.read_text() != usual:  # the testbed has its reasons
        subprocess.run(["/sbin/rmmod", "kvm_intel"], check=True)
        module = directory / "kvm-intel.ko"
        subprocess.run(["/sbin/insmod", module, f"enable_apicv={usual.strip()}"], check=True)
    weaknesses.PARAMETER.write_text(",".join(weaknesses.names_of(accepted)) + "\n")
    assert modules.status().srcversion == before.srcversion


@pytest.fixture
def built() -> Path:
    """Directory of the patched modules."""
    return Path(os.environ["PYKVM_MODULES"])


def _stock(name: str) -> Path:
    found = subprocess.run(
        ["/sbin/modinfo", "-n", name], capture_output=True, text=True, check=True
    ).stdout
    return Path(found.strip())


@pytest.mark.elisa
def test_restore_and_load(patched: modules.Status) -> None:
    assert modules.restore() == []
    stock = modules.status()
    assert stock.state == "stock"
    assert stock.elisa == 0
    assert stock.srcversion.keys() == {"kvm", "kvm_intel"}
    assert stock.srcversion != patched.srcversion
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)
    assert modules.restore() == []  # a second time changes nothing

    assert modules.load() == []
    again = modules.status()
    assert again == patched
    assert again.elisa > 0


@pytest.mark.elisa
@pytest.mark.usefixtures("patched")
def test_parameters_survive(built: Path) -> None:
    writable = PARAMETERS / "kvm/parameters/halt_poll_ns"
    fixed = PARAMETERS / "kvm_intel/parameters/fasteoi"
    usual = fixed.read_text()
    assert usual == "Y\n"
    subprocess.run(["/sbin/rmmod", "kvm_intel", "kvm"], check=True)
    subprocess.run(["/sbin/insmod", built / "kvm.ko"], check=True)
    subprocess.run(["/sbin/insmod", built / "kvm-intel.ko", "fasteoi=N"], check=True)
    writable.write_text("12345")

    assert modules.load() == []
    assert modules.status().state == "patched"
    assert fixed.read_text() == "N\n"
    assert writable.read_text() == "12345\n"

    subprocess.run(["/sbin/rmmod", "kvm_intel", "kvm"], check=True)
    assert modules.status().state == "absent"
    assert modules.load() == []  # from nothing, with nothing to carry over
    assert fixed.read_text() == usual


@pytest.mark.elisa
@pytest.mark.usefixtures("patched")
def test_what_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "load", "--accept", "l1tf,siblings"]) == 0
    assert "accepted weaknesses: l1tf, siblings\n" in capsys.readouterr().out
    assert modules.load() == []
    assert weaknesses.accepted() == Weak.L1TF | Weak.SIBLINGS
    assert main(["kernel", "load", "--accept", "mds"]) != 0  # and nothing is loaded anew
    assert weaknesses.accepted() == Weak.L1TF | Weak.SIBLINGS
    assert main(["kernel", "load", "--accept", "l1tf"]) == 0
    assert weaknesses.PARAMETER.read_text() == "l1tf\n"


@pytest.mark.elisa
@pytest.mark.usefixtures("patched")
def test_refuses_while_somebody_uses_kvm() -> None:
    script = (
        "import fcntl, os; kvm = os.open('/dev/kvm', os.O_RDWR); "
        "vm = fcntl.ioctl(kvm, 0xAE01, 0); os.close(kvm); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        try:
            for change in (modules.restore, modules.load):
                with pytest.raises(modules.ModulesInUseError, match=rf"in use by .*\({user.pid}\)"):
                    change()
                assert modules.status().state == "patched"
        finally:
            user.communicate(b"\n")


@pytest.mark.elisa
@pytest.mark.usefixtures("patched")
def test_modules_that_are_no_good_leave_the_stock_ones(built: Path, tmp_path: Path) -> None:
    broken = bytearray((built / "kvm-intel.ko").read_bytes())
    broken[18] ^= 0xFF  # e_machine of the ELF header: modinfo ignores it, the kernel does not
    (tmp_path / "kvm.ko").write_bytes((built / "kvm.ko").read_bytes())
    (tmp_path / "kvm-intel.ko").write_bytes(broken)
    with pytest.raises(modules.ModuleLoadError, match="distribution's KVM is loaded again"):
        modules.load(tmp_path)
    assert modules.status().state == "stock"
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)

    # These modules load, but they are the distribution's own.
    for name in ("kvm", "kvm-intel"):
        (tmp_path / f"{name}.ko").unlink()
        (tmp_path / f"{name}.ko").symlink_to(_stock(name))
    with pytest.raises(modules.ModuleLoadError, match=r"no EPTP switching.*loaded again"):
        modules.load(tmp_path)
    assert modules.status().state == "stock"


@pytest.mark.elisa
@pytest.mark.usefixtures("patched")
def test_modules_that_are_missing_or_foreign(built: Path, tmp_path: Path) -> None:
    with pytest.raises(modules.ModulesMissingError, match=r"no .*kvm\.ko: .*pykvm kernel build"):
        modules.load(tmp_path)
    magic = platform.release().encode()
    foreign = (
        (built / "kvm.ko").read_bytes().replace(b"vermagic=" + magic, b"vermagic=" + magic[::-1])
    )
    (tmp_path / "kvm.ko").write_bytes(foreign)
    foreign_release = f"not for {re.escape(platform.release())}"
    with pytest.raises(modules.ModulesMissingError, match=foreign_release):
        modules.load(tmp_path)
    assert modules.status().state == "patched"


@pytest.mark.elisa
def test_only_root_may() -> None:
    script = (
        "import os\n"
        "from pykvm.kernel import modules\n"
        "os.setuid(65534)\n"
        "for change in (modules.load, modules.restore):\n"
        "    try:\n        change()\n"
        "    except modules.NotRootError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("only root may exchange kernel modules: ") == 2


def _as_root_on(monkeypatch: pytest.MonkeyPatch, vendor: str, *flags: str) -> None:
    # Stands in for another machine. The test is about the refusal, which precedes any change.
    processor = Processor(vendor, "a processor", 6, 1, 1, "", frozenset(flags))
    monkeypatch.setattr(modules, "read_processor", lambda: processor)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("vendor", "flags", "says"),
    [
        ("AuthenticAMD", ["svm"], "by AuthenticAMD, not an Intel one"),
        ("GenuineIntel", [], "without VMX"),
        ("", [], "an unknown maker"),
    ],
)
def test_unsupported_processors(
    vendor: str, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_root_on(monkeypatch, vendor, *flags)
    advice = "pykvm testbed -- COMMAND"
    with pytest.raises(modules.UnsupportedProcessorError, match=f"{says}.*{advice}"):
        modules.load()


@pytest.mark.unit
def test_built_in_kvm_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_root_on(monkeypatch, "GenuineIntel", "vmx")
    (tmp_path / "kvm/parameters").mkdir(parents=True)
    monkeypatch.setattr(modules, "_SYS_MODULE", tmp_path)
    for change in (modules.load, modules.restore):
        with pytest.raises(modules.KvmBuiltInError, match="built into the running kernel"):
            change()


@pytest.mark.unit
def test_a_test_build_is_told_by_its_modules_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "_SYS_MODULE", tmp_path)
    for name in ("kvm", "kvm_intel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "refcnt").write_text("0\n")
    assert modules.status().test_build == ""
    assert modules.status().state != "test build"
    # One of the two is enough: a mix is no patched KVM either.
    (tmp_path / "kvm/version").write_text("test build: weaken.patch 0a1b2c3d\n")
    assert modules.status().test_build == "weaken.patch 0a1b2c3d"
    assert modules.status().state == "test build"
    check = next(each for each in checks.run_checks() if each.name == "patched KVM")
    assert not check.ok
    assert "test build (weaken.patch 0a1b2c3d)" in check.found
