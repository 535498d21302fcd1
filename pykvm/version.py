"""The version of this pykvm."""

import importlib.metadata
import tomllib

from pykvm.resources import CHECKOUT, DISTRIBUTION

__all__ = ["version"]


def version() -> str:
    """Return the version, "0.1.0": a checkout's from its pyproject.toml, else the package's."""
    project = None if CHECKOUT is None else CHECKOUT / "pyproject.toml"
    if project is not None and project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    return importlib.metadata.version(DISTRIBUTION)
