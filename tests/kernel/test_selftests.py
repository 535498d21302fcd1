"""Refusals of the build of KVM's selftests; tests/testbed runs the results."""

import tarfile
from pathlib import Path

import pytest

from pykvm.kernel import selftests as kernel_selftests
from pykvm.kernel.packages import Source
from pykvm.kernel.source_tree import UnpackError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]


def test_source_that_is_no_archive(tmp_path: Path) -> None:
    tarball = tmp_path / "linux-source-6.1.tar.xz"
    tarball.write_bytes(b"no archive")
    with pytest.raises(UnpackError, match="cannot unpack the selftests"):
        kernel_selftests.build(Source("6.1", tarball, ""))


def test_source_without_selftests(tmp_path: Path) -> None:
    tarball = tmp_path / "linux-source-6.1.tar.xz"
    makefile = tmp_path / "Makefile"
    makefile.write_text("all:\n")
    with tarfile.open(tarball, "w:xz") as archive:
        archive.add(makefile, "linux-source-6.1/Makefile")
    with pytest.raises(UnpackError, match=r"linux-source-6\.1"):
        kernel_selftests.build(Source("6.1", tarball, ""))


def test_programs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "programs").write_text("x86_64/b_test\nz_test\na_test\n")
    assert kernel_selftests.programs(tmp_path) == ["a_test", "x86_64/b_test", "z_test"]
