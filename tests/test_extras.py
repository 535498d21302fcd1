"""Requirements of the optional parts, as reported and as in pyproject.toml."""

import importlib.metadata
import importlib.util
import shlex
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from pykvm.errors import PykvmError
from pykvm.extras import ExtraMissingError, install_step
from pykvm.resources import DISTRIBUTION, PACKAGE

pytestmark = pytest.mark.unit

_PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("extra", ["charts", "verify"])
def test_step_installs_what_the_extra_needs(extra: str) -> None:
    step = shlex.split(ExtraMissingError(extra, "module").next_step)
    assert step[:5] == ["type:", sys.executable, "-m", "pip", "install"]
    assert sorted(step[5:]) == sorted(_PROJECT["optional-dependencies"][extra])


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert install_step(["cffi>=1.16"]) == f"install for {sys.executable}: 'cffi>=1.16'"


def test_a_python_that_is_left_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert " -m pip install " in install_step(["cffi"])  # in a virtual environment
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert install_step(["cffi"]) == "install pykvm in a virtual environment, and there: cffi"


def test_name_of_the_distribution() -> None:
    assert _PROJECT["name"] == DISTRIBUTION


def test_checkout_that_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    step = ExtraMissingError("charts", "matplotlib").next_step
    assert step == f"type: make -C {PACKAGE.parent} setup"


def test_message() -> None:
    error = ExtraMissingError("charts", "matplotlib")
    assert isinstance(error, PykvmError)
    assert str(error).startswith("the Python package matplotlib is missing: type: ")
