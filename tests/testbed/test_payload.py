"""What goes into the emulated host: the choice of files, and the image, read back by xorriso."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.testbed import payload

pytestmark = pytest.mark.unit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in {
        ".gitignore": "build/\n*.so\nsecret\n__pycache__/\n",
        "pykvm/a.py": "x = 1\n",
        "pykvm/broken.py": "def (\n",
        "pykvm/_native.so": "\x7fELF",
        "tests/__pycache__/test_a.cpython-311-pytest-9.0.pyc": "code",
        "tests/__pycache__/test_a.cpython-311.pyc": "code",
        "new=file.txt": "untracked",
        "secret": "ignored",
        "build/out.json": "{}",
        "gone.txt": "deleted, but still in the index",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", ".gitignore", "pykvm", "gone.txt"], cwd=root, check=True)
    (root / "gone.txt").unlink()
    return root


_EXPECTED = {
    ".gitignore",
    "pykvm/a.py",
    "pykvm/broken.py",
    "pykvm/_native.so",
    "tests/__pycache__/test_a.cpython-311-pytest-9.0.pyc",
    "new=file.txt",
    "build/out.json",
}


def test_files_are_gits_and_what_was_built(checkout: Path) -> None:
    assert payload.checkout_files(checkout) == _EXPECTED


def test_without_git_everything_goes_in(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert payload.checkout_files(checkout) == _EXPECTED | {"secret"}


@pytest.mark.skipif(shutil.which("xorriso") is None, reason="no xorriso")
@pytest.mark.usefixtures("own_cache")
def test_image_holds_checkout_job_and_code(checkout: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("kvm.ko", "kvm-intel.ko"):
        (modules / name).write_text(name)
    work = tmp_path / "work"
    work.mkdir()
    job = payload.Job("run", ["echo", "a b"], str(checkout), str(checkout), "payload")
    payload.write(work / "files.iso", job, modules, b"typed")

    extract = ["-osirrox", "on", "-indev", str(work / "files.iso"), "-extract", "/"]
    subprocess.run(["xorriso", *extract, str(tmp_path / "found")], check=True, capture_output=True)
    found = tmp_path / "found"
    names = {
        str(p.relative_to(found / "checkout"))
        for p in (found / "checkout").rglob("*")
        if p.is_file()
    }
    assert names == _EXPECTED | {"pykvm/__pycache__/a.cpython-311.pyc"}
    assert (found / "checkout/new=file.txt").read_text() == "untracked"
    assert json.loads((found / "job.json").read_text())["command"] == ["echo", "a b"]
    assert (found / "stdin").read_bytes() == b"typed"
    assert (found / "modules/kvm-intel.ko").read_text() == "kvm-intel.ko"


def test_directory_without_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm.ko").touch()
    with pytest.raises(
        payload.PayloadError, match=r"has no kvm-intel\.ko; run: pykvm kernel build"
    ):
        payload.module_files(tmp_path)
