"""Optional parts: what they are told to need is what pyproject.toml says."""

import importlib.metadata
import shlex
import sys
import tomllib

import pytest

from pykvm.errors import PykvmError
from pykvm.extras import ExtraMissingError, install_command
from pykvm.resources import DISTRIBUTION, PACKAGE

pytestmark = pytest.mark.unit

_PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("extra", ["charts", "verify"])
def test_command_installs_what_the_extra_needs(extra: str) -> None:
    command = shlex.split(install_command(extra))
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert sorted(command[4:]) == sorted(_PROJECT["optional-dependencies"][extra])


def test_name_of_the_distribution() -> None:
    assert _PROJECT["name"] == DISTRIBUTION


def test_checkout_that_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert install_command("charts") == "make setup"


def test_message() -> None:
    error = ExtraMissingError("charts", "matplotlib")
    assert isinstance(error, PykvmError)
    assert str(error).startswith("the Python package matplotlib is missing: type: ")
