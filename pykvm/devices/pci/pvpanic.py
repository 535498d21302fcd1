"""A device by which a guest's kernel says that it has panicked.

Source: QEMU docs/specs/pvpanic.rst; Linux drivers/misc/pvpanic.
"""

from collections.abc import Callable
from typing import Final

from pykvm.devices.pci.function import Bar, PciFunction

__all__ = ["Pvpanic"]

_IDS: Final = (0x1B36, 0x0011, 0x1AF4, 0x1100)
_CLASS: Final = 0x08_80_00  # other system peripheral
_PANICKED: Final = 1 << 0
_CRASH_KERNEL: Final = 1 << 1


class Pvpanic(PciFunction):
    """The device, one register of a byte.

    A guest that starts a crash kernel of its own says so with another bit, and goes on.

    Args:
        panicked: called when the guest has panicked.
    """

    def __init__(self, panicked: Callable[[], object]) -> None:
        super().__init__(_IDS, _CLASS)
        self.add_bar(16)
        self._panicked = panicked

    def read_bar(self, bar: Bar, offset: int, size: int) -> bytes:
        """Return which events the device understands."""
        register = bytes([_PANICKED | _CRASH_KERNEL]).ljust(bar.size, b"\0")
        return register[offset : offset + size]

    def write_bar(self, bar: Bar, offset: int, data: bytes) -> None:
        """Take an event."""
        if offset == 0 and data[0] & _PANICKED:
            self._panicked()
