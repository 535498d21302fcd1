"""Optional dependencies of the distribution, and the command that installs them."""

import importlib.metadata
import importlib.util
import re
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.resources import CHECKOUT, DISTRIBUTION

__all__ = ["ExtraMissingError", "install_step"]


class ExtraMissingError(PykvmError):
    """A package of an optional dependency is not installed.

    Args:
        extra: name of the optional dependency in pyproject.toml.
        module: module that is missing.
    """

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(f"the Python package {module} is missing", _extra_step(extra))


def install_step(requirements: Sequence[str]) -> str:
    """Return the next step that installs Python packages for this pykvm.

    Args:
        requirements: requirement specifiers, such as "matplotlib>=3.7".
    """
    names = shlex.join(requirements)
    if importlib.util.find_spec("pip") is None:
        return f"install for {shlex.quote(sys.executable)}: {names}"
    if _is_left_to_the_system():
        return f"install pykvm in a virtual environment, and there: {names}"
    return f"type: {shlex.join([sys.executable, '-m', 'pip', 'install'])} {names}"


def _extra_step(extra: str) -> str:
    """Return the next step that installs the optional dependency `extra`.

    It names the packages themselves, because the source of an installation is not recorded.
    """
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not set up
        return f"type: {shlex.join(['make', '-C', str(CHECKOUT), 'setup'])}"
    marker = re.compile(rf"\bextra\s*==\s*['\"]{re.escape(extra)}['\"]")
    parts = (requirement.partition(";") for requirement in requirements)
    return install_step([text.strip() for text, _, condition in parts if marker.search(condition)])


def _is_left_to_the_system() -> bool:
    """Return whether pip refuses to install here, as on Debian (PEP 668)."""
    mark = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and mark.exists()
