"""Next steps that can work on this machine: packages and modules are named if they exist here."""

import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pykvm.host import debian_packages
from pykvm.host.commands import as_root

__all__ = ["install", "load_module", "module_exists"]

_MODULES = Path("/lib/modules")


def install(packages: Sequence[str], otherwise: str = "", *, again: bool = False) -> str:
    """Return how to install Debian packages; `otherwise` where apt has not all of them.

    again: what is installed is replaced by a new copy.
    """
    names = " ".join(dict.fromkeys(packages))
    if shutil.which("apt-get") is None:
        return f"install what Debian has in: {names}"
    how = "--reinstall" if again else "--no-install-recommends"
    command = as_root(f"apt-get install {how} {names}")
    known = debian_packages.known_versions(names.split())
    if all(name in known for name in names.split()):
        return command
    if not debian_packages.has_lists():
        return f"{as_root('apt-get update')}, then: {command}"
    return otherwise or f"find packages for this system in place of Debian's {names}"


def load_module(name: str, otherwise: str) -> str:
    """Return how to load a module of the running kernel; `otherwise` if it has no such module."""
    return as_root(f"modprobe {name}") if module_exists(name) else otherwise


def module_exists(name: str, release: str = "") -> bool:
    """Return whether a kernel, by default the running one, has the module `name` to load."""
    try:
        listed = (_MODULES / (release or platform.release()) / "modules.dep").read_text()
    except OSError:
        return False
    pattern = re.sub("[-_]", "[-_]", re.escape(name).replace("\\-", "-"))
    return re.search(rf"(?:^|/){pattern}\.ko[.\w]*:", listed, re.MULTILINE) is not None
