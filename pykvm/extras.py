"""Optional parts of the distribution, and how to get what one of them needs."""

import importlib.metadata
import re
import shlex
import sys

from pykvm.errors import PykvmError
from pykvm.resources import DISTRIBUTION

__all__ = ["ExtraMissingError", "install_command"]


class ExtraMissingError(PykvmError):
    """A package that an optional part needs is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        command = install_command(extra)
        super().__init__(f"the Python package {module} is missing", f"type: {command}")


def install_command(extra: str) -> str:
    """Return the command that installs what `extra` of pyproject.toml needs, beside this pykvm.

    It names the packages themselves: where an installation came from, nobody knows any more.
    """
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not set up
        return "make setup"
    marker = re.compile(rf"\bextra\s*==\s*['\"]{re.escape(extra)}['\"]")
    parts = (requirement.partition(";") for requirement in requirements)
    names = [text.strip() for text, _, condition in parts if marker.search(condition)]
    return shlex.join([sys.executable, "-m", "pip", "install", *names])
