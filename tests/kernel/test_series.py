"""Choice of the kernel for a series: an installed one, else one with all packages in apt."""

import subprocess
from pathlib import Path

import pytest

from pykvm.host import debian_packages
from pykvm.kernel import packages as kernel_packages
from pykvm.kernel import series as kernel_series
from pykvm.kernel.series import HostKernel
from pykvm.resources import KERNEL_PATCHES
from tests.rigs import apt

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

_NEW, _OLD = "6.12.117+deb12-cloud-amd64", "6.12.99+deb12-cloud-amd64"

# Output of `apt-cache madison`: package, version, source.
_MADISON = f"""\
linux-headers-{_NEW} | 6.12.117-1 | http://mirror.example bookworm/main amd64 Packages
linux-headers-6.12.117+deb12-common | 6.12.117-1 | http://mirror.example bookworm/main Packages
linux-kbuild-6.12.117+deb12 | 6.12.117-1 | http://mirror.example bookworm/main amd64 Packages
linux-image-{_NEW}-unsigned | 6.12.117-1 | http://mirror.example bookworm/main amd64 Packages
linux-headers-{_OLD} | 6.12.99-2 | http://mirror.example bookworm/main amd64 Packages
linux-headers-{_OLD} | 6.12.99-10 | http://mirror.example bookworm/main amd64 Packages
linux-headers-6.12.99+deb12-common | 6.12.99-2 | http://mirror.example bookworm/main Packages
linux-headers-6.12.99+deb12-common | 6.12.99-10 | http://mirror.example bookworm/main Packages
linux-kbuild-6.12 | 6.12.99-2 | http://mirror.example bookworm/main amd64 Packages
linux-kbuild-6.12 | 6.12.99-10 | http://mirror.example bookworm/main amd64 Packages
linux-image-{_OLD} | 6.12.99-2 | http://mirror.example bookworm/main amd64 Packages
linux-image-{_OLD} | 6.12.99-10 | http://mirror.example bookworm/main amd64 Packages
linux-source-6.12 | 6.12.99-2 | http://mirror.example bookworm/main amd64 Packages
linux-source-6.12 | 6.12.99-10 | http://mirror.example bookworm/main amd64 Packages
linux-source-6.12 | 6.12.117-1 | http://mirror.example bookworm/main Sources
"""


@pytest.fixture(autouse=True)
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    really = kernel_packages.installed_headers

    def installed(src: Path = kernel_packages.SRC) -> list[str]:
        return [] if src == kernel_packages.SRC else really(src)

    monkeypatch.setattr(kernel_packages, "installed_headers", installed)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install an apt-cache that knows `_MADISON`; return the file that logs its arguments."""
    return apt.offer(tmp_path, monkeypatch, _MADISON)


def _available(tmp_path: Path, text: str) -> None:
    (tmp_path / "madison").write_text(text)


@pytest.mark.usefixtures("asked")
def test_the_newest_whose_parts_are_all_there(tmp_path: Path) -> None:
    # The source of 6.12.117 is only offered as a source package.
    found = kernel_series.newest_kernel("6.12")
    assert found == HostKernel("6.12", _OLD, "6.12.99-10", installed=False)


@pytest.mark.usefixtures("asked")
def test_the_newest_of_several(tmp_path: Path) -> None:
    _available(tmp_path, _MADISON.replace("main Sources", "main amd64 Packages"))
    found = kernel_series.newest_kernel("6.12")
    assert found == HostKernel("6.12", _NEW, "6.12.117-1", installed=False)
    old = kernel_series.find_kernel(_OLD)
    assert old == HostKernel("6.12", _OLD, "6.12.99-10", installed=False)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("part", ["linux-headers-6.12.99+deb12-common", "linux-kbuild", "-image-"])
def test_a_kernel_that_lacks_a_part(tmp_path: Path, part: str) -> None:
    kept = [line for line in _MADISON.splitlines(keepends=True) if part not in line]
    assert len(kept) < len(_MADISON.splitlines())
    _available(tmp_path, "".join(kept))
    with pytest.raises(kernel_series.KernelMissingError, match=r"6\.12 .*: .*apt-get update"):
        kernel_series.newest_kernel("6.12")


def test_apt_is_asked_once_for_one_state_of_its_lists(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        kernel_series.newest_kernel("6.12")
    assert asked.read_text() == "pkgnames\nmadison\n"
    monkeypatch.setattr(debian_packages, "lists_fingerprint", lambda: "updated")
    kernel_series.newest_kernel("6.12")
    assert asked.read_text() == "pkgnames\nmadison\n" * 2


def test_no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    with pytest.raises(kernel_series.KernelMissingError):
        kernel_series.newest_kernel("6.12")


def _offer(monkeypatch: pytest.MonkeyPatch, *offered: str) -> None:
    def known(series: str) -> list[HostKernel]:
        release = f"{series}.7+deb-cloud-amd64"
        return [HostKernel(series, release, "1", installed=False)] if series in offered else []

    monkeypatch.setattr(kernel_packages, "installed_headers", list)
    monkeypatch.setattr(kernel_series, "_known_to_apt", known)


def test_the_default_is_one_that_debian_has(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "6.1", "6.12")
    assert kernel_series.offered_series() == ["6.1", "6.12"]
    assert kernel_series.newest_kernel().series == kernel_series.default_series() == "6.1"
    _offer(monkeypatch, "6.12")
    assert kernel_series.offered_series() == ["6.12"]
    assert kernel_series.newest_kernel().series == kernel_series.default_series() == "6.12"


def test_a_series_that_debian_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "6.12")
    with pytest.raises(
        kernel_series.KernelMissingError, match=r"the 6\.1 series .*: use the series 6\.12$"
    ):
        kernel_series.newest_kernel("6.1")
    _offer(monkeypatch)
    with pytest.raises(
        kernel_series.KernelMissingError, match=r"the 6\.1 series .*: .*apt-get update"
    ):
        kernel_series.newest_kernel()


def test_unknown_series() -> None:
    with pytest.raises(kernel_series.SeriesUnknownError, match=r"Linux 5\.10: .* 6\.1, 6\.12"):
        kernel_series.newest_kernel("5.10")


def test_every_series_has_its_patch() -> None:
    patches = {path.stem.removeprefix("linux-") for path in KERNEL_PATCHES.glob("linux-*.patch")}
    assert patches == set(kernel_series.SERIES)


@pytest.mark.usefixtures("asked")
def test_installed_packages_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ["6.12.1+deb12-cloud-amd64", "6.12.5+deb12-amd64", "6.1.0-56-cloud-amd64"]
    monkeypatch.setattr(kernel_packages, "installed_headers", lambda: installed)
    versions = {"linux-source-6.12": "6.12.1-1", f"linux-headers-{installed[0]}": "6.12.1-1"}

    def headers(release: str) -> kernel_packages.Headers:
        package = versions.get(f"linux-headers-{release}", "other")
        return kernel_packages.Headers(release, Path("/none"), "6.12.1", package, "gcc")

    def source(series: str) -> kernel_packages.Source:
        return kernel_packages.Source(series, Path("/none"), versions[f"linux-source-{series}"])

    monkeypatch.setattr(kernel_packages, "find_headers", headers)
    monkeypatch.setattr(kernel_packages, "find_source", source)
    found = kernel_series.newest_kernel("6.12")
    assert found == HostKernel("6.12", installed[0], "6.12.1-1", installed=True)
    assert kernel_series.packages_directory(found) == kernel_packages.SRC
    # Source of another version is as good as none: apt has a set that fits together.
    versions["linux-source-6.12"] = "6.12.0-1"
    assert kernel_series.newest_kernel("6.12").release == _OLD


def _deb(directory: Path, name: str, files: dict[str, str]) -> None:
    tree = directory / name
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    control = tree / "DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text(
        f"Package: {name}\nVersion: 6.12.99-10\nArchitecture: all\nMaintainer: a <a@b>\n"
        "Description: made for a test\n"
    )
    subprocess.run(
        ["dpkg-deb", "-b", tree, directory / f"{name}.deb"], check=True, capture_output=True
    )


@pytest.mark.usefixtures("asked")
def test_packages_are_unpacked_for_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debs = tmp_path / "debs"
    common = "/usr/src/linux-headers-6.12.99+deb12-common/Makefile"
    makefile = "VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 99\n"
    headers = f"usr/src/linux-headers-{_OLD}"
    config = {f"{headers}/.config": "", f"{headers}/Module.symvers": ""}
    _deb(debs, f"linux-headers-{_OLD}", {f"{headers}/Makefile": f"include {common}\n", **config})
    _deb(debs, "linux-headers-6.12.99+deb12-common", {common[1:]: makefile})
    _deb(debs, "linux-kbuild-6.12", {"usr/lib/linux-kbuild-6.12/scripts/x": ""})
    _deb(debs, "linux-source-6.12", {"usr/src/linux-source-6.12.tar.xz": "source"})

    def exact(name: str, version: str) -> debian_packages.Package:
        assert version == "6.12.99-10"
        return debian_packages.Package(f"{name}_{version}_all.deb", 1)

    def fetch(packages: list[debian_packages.Package]) -> list[Path]:
        return [debs / f"{package.file.split('_')[0]}.deb" for package in packages]

    monkeypatch.setattr(debian_packages, "exact", exact)
    monkeypatch.setattr(debian_packages, "fetch", fetch)

    src = kernel_series.place(_OLD)
    found = kernel_packages.find_headers(_OLD, src)
    assert (found.version, found.series) == ("6.12.99", "6.12")
    assert kernel_packages.find_source("6.12", src).tarball.read_text() == "source"
    assert (found.path / "../../lib/linux-kbuild-6.12/scripts/x").exists()
    assert not list(debs.glob("*.deb"))  # the archives are not needed again
    assert kernel_series.place(_OLD) == src


def test_place_of_an_unknown_kernel_is_where_it_would_be_installed() -> None:
    assert kernel_series.place("4.19.0-1-none") == kernel_packages.SRC
    assert kernel_series.place("mine") == kernel_packages.SRC
