"""An installed pykvm without a checkout: built, installed and used as a user would.

Source archive and wheel are built from a copy of the checkout's files. The wheel goes into a fresh
virtual environment, in a directory without a checkout above it, and everything here runs there.
Only the cache of built parts is the user's, since its keys depend on content.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pykvm.kernel.build import MODULES
from pykvm.kernel.series import default_series
from pykvm.resources import CAPTURE, PACKAGE
from pykvm.testbed.folder import carried_files

pytestmark = pytest.mark.testbed

_CHECKOUT = PACKAGE.parent
_MADE = re.compile(r"^build/|\.(so|pyc)$")
_FOREIGN = re.compile(r"PIP_USER|PIP_TARGET|PIP_PREFIX|VIRTUAL_ENV|PYTHON\w+|PYKVM_(?!CACHE$)\w+")


def _environment() -> dict[str, str]:
    """Return the user's environment, without settings of the checkout's venv or of the tests."""
    return {name: text for name, text in os.environ.items() if not _FOREIGN.fullmatch(name)}


def _run(command: Sequence[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _must(command: Sequence[str | Path], cwd: Path) -> str:
    done = _run(command, cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _sources() -> list[str]:
    return [name for name in carried_files(_CHECKOUT) if not _MADE.search(name)]


@dataclass(frozen=True)
class _Built:
    """Source archive, the wheel built from it, and one built from the checkout's files."""

    sdist: Path
    wheel: Path
    direct_wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> _Built:
    place = tmp_path_factory.mktemp("built")
    source = place / "source"
    for name in _sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_CHECKOUT / name, source / name, follow_symlinks=False)
    build: list[str | Path] = [sys.executable, "-m", "build", "--outdir"]
    # The first build runs in its own environment, which shows that it declares all requirements.
    _must([*build, place / "dist", source], place)
    # The second build finds remains of an earlier build of a module that is gone.
    left = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for name in (left, "lib"):
        (source / "build" / name / "pykvm").mkdir(parents=True)
        (source / "build" / name / "pykvm" / "gone.py").touch()
    _must([*build, place / "direct", "--wheel", "--no-isolation", source], place)
    return _Built(
        next((place / "dist").glob("*.tar.gz")),
        next((place / "dist").glob("*.whl")),
        next((place / "direct").glob("*.whl")),
    )


@dataclass(frozen=True)
class _Installed:
    """A virtual environment with pykvm, and a user's directory outside of it."""

    environment: Path
    work: Path

    @property
    def packages(self) -> Path:
        """Directory of the wheel's files."""
        return next(self.environment.glob("lib/python3*/site-packages"))

    def program(self, name: str) -> Path:
        return self.environment / "bin" / name

    def pykvm(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return _run([self.program("pykvm"), *arguments], cwd or self.work)

    def files(self) -> dict[str, int]:
        """Return every installed file with the time of its last change."""
        paths = (path for path in self.packages.rglob("*") if path.is_file())
        return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def environment(built: _Built, tmp_path_factory: pytest.TempPathFactory) -> _Installed:
    place = tmp_path_factory.mktemp("installed")
    installed = _Installed(place / "environment", place / "work")
    installed.work.mkdir()
    _must([sys.executable, "-m", "venv", installed.environment], place)
    # The versions with which the checkout is tested.
    pip: list[str | Path] = [
        installed.program("python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
    ]
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    (place / "constraints").write_text(_must(freeze, place))
    _must([*pip, "install", "--constraint", place / "constraints", f"{built.wheel}[verify]"], place)
    return installed


@pytest.fixture
def installed(environment: _Installed) -> Iterator[_Installed]:
    """The installation, which no use of it may change."""
    before = environment.files()
    yield environment
    assert environment.files() == before


def _wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_from_the_source_archive_holds_the_same(built: _Built) -> None:
    assert _wheel_files(built.wheel) == _wheel_files(built.direct_wheel)
    assert built.wheel.name == built.direct_wheel.name
    assert "-cp311-abi3-linux_" in built.wheel.name


def test_wheel_holds_all_that_travels(built: _Built) -> None:
    files = _wheel_files(built.wheel)
    assert not [name for name in files if not name.startswith(("pykvm/", "elisa_pykvm-"))]
    wanted = {name for name in _sources() if name.startswith("pykvm/")}
    wanted |= {
        f"pykvm/data/{name}"
        for name in _sources()
        if name.startswith(("guest/", "kernel-patches/"))
    }
    # The source archive contains the sources of the extensions.
    assert {
        name for name in wanted - files if not re.search(r"^pykvm/(\w+/)+\w+\.[ch]$", name)
    } == set()
    extensions = [Path(name) for name in sorted(files) if name.endswith(".abi3.so")]
    scripts = [Path(name) for name in sorted(files) if re.search(r"/build_\w+\.py$", name)]
    assert [path.parent for path in extensions] == [path.parent for path in scripts]


def test_source_archive_holds_no_tests(built: _Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if re.search(r"/_\w+\.c$", name)]
    assert not [name for name in names if name.startswith(("tests/", "build/"))]


def test_no_checkout_is_near(installed: _Installed) -> None:
    script = "import pykvm.resources as r; print(r.CHECKOUT, r.PACKAGE, r.GUEST_SOURCES)"
    package = installed.packages / "pykvm"
    said = _must([installed.program("python"), "-c", script], installed.work)
    assert said == f"None {package} {package / 'data' / 'guest'}\n"


def test_version(installed: _Installed) -> None:
    version = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    done = installed.pykvm("--version", cwd=Path("/"))
    assert (done.returncode, done.stdout) == (0, f"pykvm {version}\n")
    assert (installed.packages / "pykvm" / "py.typed").is_file()


@pytest.mark.parametrize("folder", ["work", "/"])
def test_doctor(installed: _Installed, folder: str) -> None:
    done = installed.pykvm("doctor", "--json", cwd=installed.work.parent / folder)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    findings = json.loads(done.stdout)
    assert findings["emulated_host"]
    assert findings["fingerprint"]["commit"] == ""
    assert re.fullmatch(r"\d+\.\d+\.\d+", findings["fingerprint"]["pykvm"])
    assert ".venv" not in done.stdout
    assert "make setup" not in done.stdout


def test_verify_gate(installed: _Installed) -> None:
    done = installed.pykvm("verify-gate", "--states", "1", "--seed", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^verify-gate: (\d+) of \1 hold \(seed 1\)$", done.stdout, re.MULTILINE)


def test_kernel_build(installed: _Installed) -> None:
    done = installed.pykvm("kernel", "build", "--series", default_series())
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip().splitlines()[-1])
    assert [name for name in MODULES if not (directory / f"{name}.ko").is_file()] == []


def test_object_of_ones_own_on_the_emulated_host(installed: _Installed) -> None:
    for path in (_CHECKOUT / "examples").iterdir():
        shutil.copy(path, installed.work)
    done = installed.pykvm(
        "testbed", "--", "sh", "-c", "mkdir build; python3 adder.py | tee build/said"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the sum in the object's memory: 12000"
    assert (installed.work / "build" / "said").read_text() == done.stdout


def test_its_own_program_on_the_emulated_host(installed: _Installed) -> None:
    version = json.loads(installed.pykvm("doctor", "--json").stdout)["fingerprint"]["pykvm"]
    done = installed.pykvm(
        "testbed", "--", "sh", "-c", f"{installed.program('pykvm')} doctor --json"
    )
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["elisa_here"]
    assert findings["fingerprint"]["pykvm"] == version


@pytest.mark.parametrize("capture", [[], ["--capture", "own.pcap.gz"]], ids=["default", "own"])
def test_demo(installed: _Installed, capture: list[str]) -> None:
    (installed.work / "own.pcap.gz").write_bytes(gzip.compress(CAPTURE.read_bytes()))
    done = installed.pykvm("demo", "--rounds", "1", "--calls", "10", *capture)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for path in ("vmfunc", "vmcall", "direct"):
        (counts,) = (row[5:] for row in rows if row[:1] == [path])
        assert counts == ["1227", "1227", "0", "0"]  # sent, delivered, dropped, corrupted
    assert done.stdout.splitlines()[-1] == "kept: build/demo/results.json"
    assert json.loads((installed.work / "build/demo/results.json").read_text())["rounds"] == 1
    # Without matplotlib there are no charts; the next step must name this environment.
    assert f"{installed.program('python')} -m pip install 'matplotlib" in done.stderr


def test_folder_that_cannot_go_inside(installed: _Installed) -> None:
    done = installed.pykvm("testbed", "--", "true", cwd=Path("/"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"pykvm: / belongs to [^\n]*--folder DIR\n", done.stderr)
