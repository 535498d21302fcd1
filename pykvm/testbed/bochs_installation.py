"""The Bochs that emulates a processor: the installed one, or that of a newer Debian release.

The Bochs of `NEWER_RELEASE` emulates the models that the installed one does not know. Its packages
are unpacked into the cache. It is started through its own dynamic linker with its own libraries, so
that it uses none of this machine's.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host import debian_packages

__all__ = ["NEWER_RELEASE", "BochsMissingError", "Installation", "installed", "knowing", "newer"]

NEWER_RELEASE: Final = "trixie"  # Debian 13, with Bochs 3.0

# The package bochs depends on some display; bochs-term is the smallest.
_PACKAGES: Final = ("bochs", "bochs-term", "bochsbios", "vgabios")
_PROGRAM: Final = "bochs-bin"
_SHARE: Final = "usr/share/bochs"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_KEPT: Final = (_LIBRARIES, "usr/bin", _SHARE, "usr/share/vgabios")
_MERGED_USR: Final = ("bin", "lib", "lib64", "sbin")


class BochsMissingError(PykvmError):
    """No available Bochs emulates the processor, or the installed one does not start."""


@dataclass(frozen=True)
class Installation:
    """An installation of Bochs.

    Attributes:
        version: versions of its Debian packages. Only the same version can resume a state that it
            has saved.
        command: program and first arguments that start it.
        share: directory of its firmware.
        environment: environment variables to set for it.
        root: directory of an installation that is not this machine's own, else None. The other
            paths are relative to it, because Bochs and its dynamic linker split some of them at
            colons and spaces.
    """

    version: str
    command: tuple[str, ...]
    share: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None

    def models(self) -> list[str]:
        """Return the names of the processors that it emulates, oldest first.

        Raises:
            BochsMissingError: it cannot be started.
        """
        said = self._help("cpu")
        _, _, listed = said.partition("Supported CPU models:\n\n")
        if not listed:
            raise BochsMissingError(f"{self.command[-1]} does not start ({said.strip()})")
        return listed.partition("\n\n")[0].split()

    def debugger_options(self) -> list[str]:
        """Return the options that start its debugger with the commands of the file "debugger"."""
        start = ["-debugger"] if self.runs_undebugged() else []
        return [*start, "-rc", "debugger"]

    def runs_undebugged(self) -> bool:
        """Return whether it can run without its debugger, as 3.0 can, and Debian's 2.7 cannot."""
        return "-debugger" in self._help()

    def _help(self, *topic: str) -> str:
        # -q skips the start menu.
        return subprocess.run(
            [*self.command, "-q", "--help", *topic],
            cwd=self.root,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        ).stdout


def installed() -> Installation | None:
    """Return the Bochs that is installed on this machine, or None."""
    if shutil.which(_PROGRAM) is None:
        return None
    versions = (debian_packages.installed_version(name) or "" for name in _PACKAGES)
    return Installation(" ".join(versions), (_PROGRAM,), Path("/") / _SHARE)


def newer() -> Installation:
    """Return the Bochs of `NEWER_RELEASE`; fetch and unpack it if the cache lacks it.

    Raises:
        PackageError: it cannot be fetched.
    """
    key = cache.key("unpacked", NEWER_RELEASE, *_PACKAGES, *_KEPT)
    root = cache.entry("bochs", key, _unpack)
    linker = (f"{_LIBRARIES}/ld-linux-x86-64.so.2", "--library-path", _LIBRARIES)
    return Installation(
        (root / "version").read_text(),
        (*linker, f"usr/bin/{_PROGRAM}"),
        Path(_SHARE),
        {"BXSHARE": _SHARE, "LTDL_LIBRARY_PATH": f"{_LIBRARIES}/bochs/plugins"},
        root,
    )


def knowing(model: str, *, undebugged: bool = False) -> Installation:
    """Return a Bochs that emulates the processor `model`, preferably the installed one.

    Args:
        model: Bochs's name of the processor.
        undebugged: whether it must be able to run without its debugger.

    Raises:
        BochsMissingError: no Bochs emulates it.
        PackageError: see `newer`.
    """
    here = installed()
    if here is not None and model in here.models() and (not undebugged or here.runs_undebugged()):
        return here
    other = newer()
    if model in other.models():
        return other
    raise BochsMissingError(f"no bochs emulates {model}", "choose another with --cpu")


def _unpack(directory: Path) -> None:
    tree = directory / "tree"
    for name in _MERGED_USR:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    packages = debian_packages.unpack_release(NEWER_RELEASE, _PACKAGES, tree)
    for name in _KEPT:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).rename(directory / name)
    shutil.rmtree(tree)
    own = [package.spec for package in packages if package.spec.partition("=")[0] in _PACKAGES]
    (directory / "version").write_text(" ".join(own))
