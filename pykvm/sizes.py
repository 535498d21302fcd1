"""Sizes in bytes that all packages use."""

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

PAGE_SIZE: Final = 4096
"""The smallest page of x86, and the size of each of its tables (SDM vol. 3A 4.2)."""
