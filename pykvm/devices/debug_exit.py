"""A device by which a guest ends its machine with a status, as kvm-unit-tests do.

Source: QEMU hw/misc/debugexit.c (isa-debug-exit).
"""

from collections.abc import Callable
from typing import Final

from pykvm.errors import PykvmError

__all__ = ["EXIT_PORT", "DebugExit", "ExitPortError"]

EXIT_PORT: Final = 0xF4
_MOST_PORTS: Final = 8


class ExitPortError(PykvmError, ValueError):
    """Ports that cannot be."""


class DebugExit:
    """The device. A status is odd, so that none is a success by mistake: twice the value, and 1.

    Args:
        ended: called with the status, 1 to 255, when the guest writes a value.
        port: its first port.
        size: number of its ports.

    Raises:
        ExitPortError: there are no such ports.
    """

    def __init__(
        self, ended: Callable[[int], object], port: int = EXIT_PORT, size: int = 4
    ) -> None:
        if not (0 <= port < port + size <= 0x1_0000 and size <= _MOST_PORTS):
            raise ExitPortError(
                f"{size} ports from {port:#x} on", f"use 1 to {_MOST_PORTS}, up to 0xffff"
            )
        self.ports = range(port, port + size)
        self._ended = ended

    def read_port(self, port: int, size: int) -> bytes:
        """Return zeros."""
        return bytes(size)

    def write_port(self, port: int, data: bytes) -> None:
        """End the machine with the status of a value, of which the lower 7 bits count."""
        self._ended((data[0] << 1 | 1) & 0xFF)
