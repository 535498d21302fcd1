"""The releases of Debian that pykvm supports as hosts, and the one that runs here."""

import platform
from typing import Final

__all__ = ["DEBIAN_RELEASES", "is_supported", "name"]

DEBIAN_RELEASES: Final = {"12": "bookworm", "13": "trixie"}
"""By number, the code names that the archive has them under."""


def name() -> str:
    """Return what this machine's system calls itself, "Debian GNU/Linux 13 (trixie)"."""
    return _release().get("PRETTY_NAME", "unknown")


def is_supported() -> bool:
    """Return whether this machine runs one of `DEBIAN_RELEASES`."""
    release = _release()
    return release.get("ID") == "debian" and release.get("VERSION_ID") in DEBIAN_RELEASES


def _release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}
