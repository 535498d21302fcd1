"""Parsing of apt's answers."""

from pathlib import Path

import pytest

from pykvm.host.debian_packages import Package, PackageError, unpack_release

pytestmark = pytest.mark.unit

# An apt that answers $ARCHIVE to the question for the machine's archive, and otherwise repeats its
# arguments.
APT = """#!/bin/sh
case "$*" in
*indextargets*) printf '%s' "$ARCHIVE" ;;
*) echo "E: no way to $*" | sed 's/-o [^ ]*//g' >&2; exit 100 ;;
esac
"""


def test_spec_is_what_apt_understands() -> None:
    package = Package("gcc_4%3a12.2.0-3_amd64.deb", 5216)
    assert package.spec == "gcc=4:12.2.0-3"
    assert Package("libc6_2.36-9+deb12u14_amd64.deb", 1).spec == "libc6=2.36-9+deb12u14"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(APT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.usefixtures("apt")
def test_another_release_needs_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVE", "")
    with pytest.raises(PackageError, match=r"apt knows no archive of debian: .*apt-get update"):
        unpack_release("trixie", ["bochs"], tmp_path)


@pytest.mark.usefixtures("apt")
def test_another_release_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE", "http://mirror.example/debian/")
    tree = tmp_path / "tree"
    tree.mkdir()
    said = r"cannot fetch bochs of debian trixie \(.*update\): .*apt-get update"
    with pytest.raises(PackageError, match=said):
        unpack_release("trixie", ["bochs"], tree)
    assert not list(tree.iterdir())
