"""`make setup` in a copy of the checkout: with a user's settings, twice, and after a move."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.resources import PACKAGE
from pykvm.testbed.folder import carried_files

pytestmark = pytest.mark.testbed  # it needs what the emulated host needs, and the network

_CHECKOUT = PACKAGE.parent
_MADE = re.compile(r"^build/|\.(so|pyc)$")
# Settings for other work of the user's.
_FOREIGN = {
    "PIP_USER": "1",
    "PIP_TARGET": "/nonexistent/target",
    "PYTHONPATH": "/nonexistent/path",
    "GIT_DIR": "/nonexistent/git",
    "GIT_WORK_TREE": "/nonexistent",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    made = tmp_path / "a copy"
    for name in carried_files(_CHECKOUT):
        if not _MADE.search(name):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_CHECKOUT / name, made / name, follow_symlinks=False)
    return made


def _make_setup(checkout: Path) -> str:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "setup"],
        cwd=checkout,
        env={**kept, **_FOREIGN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _origin(checkout: Path) -> Path:
    """Return the path from which the checkout's Python imports pykvm."""
    code = "import pykvm.kvm; print(pykvm.__file__)"
    done = subprocess.run(
        [checkout / ".venv/bin/python", "-I", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


def test_setup_is_of_its_place(copy: Path) -> None:
    assert "making .venv anew" not in _make_setup(copy)
    assert _origin(copy) == copy / "pykvm/__init__.py"
    assert _make_setup(copy) == ""
    moved = copy.with_name("moved")
    copy.rename(moved)
    assert "making .venv anew" in _make_setup(moved)
    assert _origin(moved) == moved / "pykvm/__init__.py"
