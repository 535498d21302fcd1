"""Files that pykvm uses and that are no Python: guest sources, kernel patches, a capture.

In a checkout, `guest/` and `kernel-patches/` lie beside the package. A wheel carries them inside
it, in `pykvm/data/`, where setup.py maps them.
"""

from pathlib import Path
from typing import Final

__all__ = ["CAPTURE", "CHECKOUT", "DISTRIBUTION", "GUEST_SOURCES", "KERNEL_PATCHES", "PACKAGE"]

DISTRIBUTION: Final = "elisa-pykvm"
"""The name under which pip knows this package; `pykvm` on PyPI is another project."""

PACKAGE: Final = Path(__file__).resolve().parent
"""The directory of the package itself."""

_DATA: Final = PACKAGE / "data"
_INSTALLED: Final = (_DATA / "guest").is_dir()
_TOP: Final = _DATA if _INSTALLED else PACKAGE.parent

CHECKOUT: Final = None if _INSTALLED else PACKAGE.parent
"""The checkout that this pykvm runs from; None for an installed one."""

GUEST_SOURCES: Final = _TOP / "guest"
"""The directory of everything that runs in a guest or a sub context."""

KERNEL_PATCHES: Final = _TOP / "kernel-patches"
"""The directory of the KVM patches."""

CAPTURE: Final = _DATA / "memcached-http.pcap"
"""The packets that `pykvm demo` sends unless told otherwise; README.md beside it says whose."""
