"""Builds in directories of any name happen where the kernel's Makefiles can take the path."""

import tempfile
from pathlib import Path

import pytest

from pykvm.kernel.plain_place import PlaceError, copy_in_plain_place, is_plain, plain_directory
from tests.rigs.odd_names import ODD_NAMES

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_no_plain_path(name: str) -> None:
    assert not is_plain(Path("/cache", name))


def test_a_plain_parent_is_used(tmp_path: Path) -> None:
    with plain_directory(tmp_path) as made:
        assert made.parent == tmp_path
        assert is_plain(made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_parent_is_not(name: str, tmp_path: Path) -> None:
    parent = tmp_path / name
    parent.mkdir()
    with plain_directory(parent) as made:
        assert is_plain(made)
        (made / "file").touch()
    assert not made.exists()
    assert list(parent.iterdir()) == []


def test_no_plain_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvm.kernel.plain_place._DIRECTORIES", ())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(PlaceError) as caught, plain_directory(tmp_path / "c d"):
        pass
    assert caught.value.next_step == "set TMPDIR to a directory without them"


def test_a_copy_keeps_links_and_leaves_out(tmp_path: Path) -> None:
    tree = tmp_path / "a b"
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib/tool").write_text("tool")
    (tree / "usr/tool").symlink_to("lib/tool")
    (tree / "usr/large.tar.xz").touch()
    with copy_in_plain_place(tree, without="large*") as copy:
        assert copy != tree
        assert is_plain(copy)
        assert (copy / "usr/tool").readlink() == Path("lib/tool")
        assert (copy / "usr/tool").read_text() == "tool"
        assert not (copy / "usr/large.tar.xz").exists()
    assert not copy.exists()
    with copy_in_plain_place(tmp_path, without="large*") as same:
        assert same == tmp_path
