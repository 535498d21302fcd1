"""Programs and files of this machine that the emulated host needs, with their Debian packages."""

import os
import shutil
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.advice import install

__all__ = ["RequirementsError", "missing", "require"]

_PROGRAMS = {
    "apt-get": "apt",
    "bochs-bin": "bochs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "gcc": "gcc",
    "ld": "binutils",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "nsenter": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
    "xorriso": "xorriso",
    "xz": "xz-utils",
    "zstd": "zstd",
}
_FILES = {
    "/usr/share/bochs/BIOS-bochs-latest": "bochsbios",
    "/usr/share/vgabios/vgabios.bin": "vgabios",
}


class RequirementsError(PykvmError):
    """Programs or files that the emulated host needs are not installed."""


def missing() -> dict[str, str]:
    """Return the programs and files that this machine lacks, each with its Debian package."""
    # An ordinary user's PATH may not reach mke2fs and depmod.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    lacking = {name: _PROGRAMS[name] for name in _PROGRAMS if not shutil.which(name, path=path)}
    return lacking | {name: _FILES[name] for name in _FILES if not Path(name).exists()}


def require() -> None:
    """Check that this machine has everything that the emulated host needs.

    Raises:
        RequirementsError: a program or file is missing (see `missing`).
    """
    if lacking := missing():
        raise RequirementsError(
            f"not installed: {', '.join(lacking)}", install(sorted(set(lacking.values())))
        )
