"""Choice of the directory, and of its files, that go into the emulated host."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.resources import PACKAGE
from pykvm.testbed import folder
from pykvm.testbed.folder import (
    FolderMissingError,
    FolderNameError,
    FolderPlaceError,
    FolderTooLargeError,
    carried_files,
    current_folder,
    require_place,
)

pytestmark = pytest.mark.unit

_CHECKOUT = PACKAGE.parent


def _make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = _make(
        tmp_path / "checkout",
        {
            ".gitignore": "build/\n*.so\nsecret\n__pycache__/\nvenv/\n",
            "pykvm/a.py": "x = 1\n",
            "pykvm/_native.so": "\x7fELF",
            "tests/__pycache__/test_a.cpython-311-pytest-9.0.pyc": "code",
            "tests/__pycache__/test_a.cpython-311.pyc": "code",
            "new=file.txt": "untracked",
            "secret": "ignored",
            "build/out.json": "{}",
            "gone.txt": "deleted, but still in the index",
            "venv/pyvenv.cfg": "home = /usr/bin\n",
            "venv/lib/module.py": "",
        },
    )
    (root / "link").symlink_to("pykvm")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", ".gitignore", "pykvm", "gone.txt"], cwd=root, check=True)
    (root / "gone.txt").unlink()
    return root


_GITS = {".gitignore", "pykvm/a.py", "new=file.txt", "link", "build/out.json"}


def test_files_are_gits_and_what_was_built(checkout: Path) -> None:
    assert set(carried_files(checkout)) == _GITS


def test_own_checkout_brings_extensions_and_compiled_tests(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "CHECKOUT", checkout)
    built = {"pykvm/_native.so", "tests/__pycache__/test_a.cpython-311-pytest-9.0.pyc"}
    assert set(carried_files(checkout)) == _GITS | built


def test_part_of_a_checkout(checkout: Path) -> None:
    assert carried_files(checkout / "pykvm") == ["a.py"]


def test_without_git_everything_goes_in(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert set(carried_files(checkout)) == _GITS | {"secret", "pykvm/_native.so"}


def test_repository_of_the_environment_is_not_meant(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _make(tmp_path / "other", {"foreign": ""})
    subprocess.run(["git", "init", "-q"], cwd=other, check=True)
    subprocess.run(["git", "add", "foreign"], cwd=other, check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert set(carried_files(checkout)) == _GITS


def test_machine_without_git(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "secret" in carried_files(checkout)


def test_cache_inside_the_folder_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, {"work.c": "", "cache/pykvm/object/1/image.elf": ""})
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache" / "pykvm"))
    assert carried_files(tmp_path) == ["work.c"]


def test_names_are_bytes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    assert carried_files(tmp_path) == [os.fsdecode(b"caf\xe9")]


def test_line_break_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "two\nlines").touch()
    with pytest.raises(FolderNameError, match=r"has a line break: rename 'two\\nlines'"):
        carried_files(tmp_path)


@pytest.mark.parametrize("git", [False, True])
def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: bool) -> None:
    _make(tmp_path, {f"{number}.txt": "12345678" for number in range(10)})
    if git:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(folder, "MOST_FILES", 10)
    assert len(carried_files(tmp_path)) == 10
    monkeypatch.setattr(folder, "MOST_FILES", 9)
    with pytest.raises(FolderTooLargeError, match=r"holds more than 9 files: .*--folder DIR"):
        carried_files(tmp_path)
    monkeypatch.setattr(folder, "MOST_FILES", 10)
    monkeypatch.setattr(folder, "MOST_BYTES", 79)
    with pytest.raises(FolderTooLargeError, match=r"holds more than 0 MiB"):
        carried_files(tmp_path)


def test_large_artifacts_of_a_checkout_stay_out(checkout: Path) -> None:
    with (checkout / "build/large").open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert set(carried_files(checkout)) == _GITS


def test_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_CHECKOUT / "tests")
    assert current_folder() == _CHECKOUT
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert current_folder() == gone
    gone.rmdir()
    with pytest.raises(FolderMissingError, match="does not exist any more"):
        current_folder()


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/usr/share", "/run", "/proc/sys", "/dev"])
def test_places_of_the_system(path: str) -> None:
    with pytest.raises(FolderPlaceError, match=f"{path} belongs to the emulated host's own"):
        require_place(Path(path))


def test_places_for_work(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/tmp"), Path("/usr/src")):
        require_place(path)
    with pytest.raises(FolderMissingError, match="there is no folder"):
        require_place(tmp_path / "none")
