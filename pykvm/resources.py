"""Files other than Python that pykvm uses: guest sources, kernel patches, a capture.

In a checkout, ``guest/`` and ``kernel-patches/`` are beside the package. A wheel has them in
``pykvm/data/``, where setup.py maps them.
"""

from pathlib import Path
from typing import Final

__all__ = ["CAPTURE", "CHECKOUT", "DISTRIBUTION", "GUEST_SOURCES", "KERNEL_PATCHES", "PACKAGE"]

DISTRIBUTION: Final = "elisa-pykvm"
"""Name of this package for pip; ``pykvm`` on PyPI is another project."""

PACKAGE: Final = Path(__file__).resolve().parent
"""Directory of the package itself."""

_DATA: Final = PACKAGE / "data"
_INSTALLED: Final = (_DATA / "guest").is_dir()
_TOP: Final = _DATA if _INSTALLED else PACKAGE.parent

CHECKOUT: Final = None if _INSTALLED else PACKAGE.parent
"""Checkout that this pykvm runs from; None if it is installed."""

GUEST_SOURCES: Final = _TOP / "guest"
"""Directory of everything that runs in a guest or a sub context."""

KERNEL_PATCHES: Final = _TOP / "kernel-patches"
"""Directory of the KVM patch."""

CAPTURE: Final = _DATA / "memcached-http.pcap"
"""Packets that ``pykvm demo`` sends by default; README.md beside the file says whose they are."""
