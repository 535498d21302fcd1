"""The image for the emulated host, read back by xorriso."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from pykvm.resources import PACKAGE
from pykvm.testbed import payload
from tests.rigs.odd_names import ODD_NAMES

pytestmark = pytest.mark.unit

_FILES = {
    "a.py": b"x = 1\n",
    "broken.py": b"def (\n",
    "sub/new=file.txt": b"text",
    os.fsdecode(b"caf\xe9"): b"no UTF-8",
}


@pytest.fixture
def work(tmp_path: Path, own_cache: Path) -> Path:
    """Return a user's directory, outside of an empty cache."""
    assert not own_cache.exists()
    for name, data in _FILES.items():
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "work"


def _packed(job: payload.Job, directory: Path, modules: Path | None = None) -> Path:
    """Return the content of the image for `job`, unpacked."""
    image, found = directory / "files.iso", directory / "found"
    payload.write(image, job, modules, b"typed")
    extract = ["-osirrox", "on", "-indev", str(image), "-extract", "/"]
    subprocess.run(["xorriso", *extract, str(found)], check=True, capture_output=True)
    return found


def _names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_image_holds_folder_job_and_code(work: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("kvm.ko", "kvm-intel.ko"):
        (modules / name).write_text(name)
    job = payload.Job("run", ["echo", "a b"], str(work), str(work), "payload")
    found = _packed(job, tmp_path, modules)
    compiled = importlib.util.cache_from_source("a.py")
    assert _names(found / "folder") == {*_FILES, compiled}
    assert (found / "folder/sub/new=file.txt").read_bytes() == b"text"
    assert json.loads((found / "job.json").read_text())["command"] == ["echo", "a b"]
    assert (found / "stdin").read_bytes() == b"typed"
    assert (found / "modules/kvm-intel.ko").read_text() == "kvm-intel.ko"
    assert not (found / "python").exists()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_places_with_any_name(name: str, work: Path, tmp_path: Path) -> None:
    folder, images = tmp_path / name / "work", tmp_path / name / "images"
    images.mkdir(parents=True)
    work.rename(folder)
    job = payload.Job("run", ["true"], str(folder), str(folder), "none")
    found = _packed(job, images)
    assert set(_FILES) < _names(found / "folder")
    assert (found / "folder/sub/new=file.txt").read_bytes() == b"text"
    assert json.loads((found / "job.json").read_text())["folder"] == str(folder)


def test_pykvm_goes_along_with_a_foreign_folder(work: Path, tmp_path: Path) -> None:
    python = payload.place_of_pykvm(work)
    found = _packed(
        payload.Job("run", ["true"], str(work), str(work), "none", python=python), tmp_path
    )
    names = _names(found / "python")
    here = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.py")}
    assert here <= names
    assert importlib.util.cache_from_source("pykvm/resources.py") in names
    assert {"guest/bare/start.S", "pykvm/data/memcached-http.pcap", "pyproject.toml"} <= names
    assert any(name.startswith("pykvm/kvm/native/_kvm.") and name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests/", ".git")) for name in names)


def test_pykvm_is_in_its_own_checkout() -> None:
    assert payload.place_of_pykvm(PACKAGE.parent) == str(PACKAGE.parent)


def test_directory_without_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm.ko").touch()
    with pytest.raises(payload.PayloadError, match=r"has no kvm-intel\.ko: .* pykvm kernel build"):
        payload.module_files(tmp_path)
