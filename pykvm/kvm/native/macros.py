"""Names of the macros that C headers define, for the builds of the cffi extensions.

The build scripts run this file by its path: pykvm cannot be imported before it is built.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

__all__ = ["macro_names"]


def macro_names(includes: str, prefixes: tuple[str, ...], directory: Path) -> list[str]:
    """Return the object-like macros with one of these prefixes, sorted.

    includes: lines of ``#include``. directory: where ``#include "..."`` looks.
    """
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    listing = subprocess.run(
        [*compiler, "-E", "-dM", f"-I{directory}", "-x", "c", "-"],
        input=includes,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    # A parenthesis right after the name starts a function-like macro.
    defined = set(re.findall(r"^#define (\w+) \S", listing, re.MULTILINE))
    return sorted(name for name in defined if name.startswith(prefixes))
