"""A PCI bus: configuration space by ECAM, and a window of guest physical addresses for BARs.

Source: PCI Express Base Specification 4.0, 7.2.2 (ECAM); PCI Firmware Specification 3.2, 4.1.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from pykvm.devices.pci.function import CONFIG_SIZE, Bar, PciFunction
from pykvm.errors import PykvmError

__all__ = ["ECAM_SIZE", "MAX_FUNCTIONS", "PciBus", "PciBusFullError"]

MAX_FUNCTIONS: Final = 32
"""Devices on the bus, of one function each."""

ECAM_SIZE: Final = 1 << 20
"""Bytes of configuration space of a bus: 32 devices of 8 functions."""

_DEVICE_SHIFT: Final = 15


class PciBusFullError(PykvmError):
    """A function for which the bus has no room."""

    def __init__(self, what: str) -> None:
        super().__init__(f"no room for another {what} on the PCI bus", "use fewer devices")


class PciBus:
    """Bus 0 of segment 0, without bridges. Any number of vCPU threads may access it.

    Args:
        ecam: GPA of its configuration space, `ECAM_SIZE` bytes.
        window: GPA and bytes of where BARs are put; the GPA is a multiple of every BAR's size.
    """

    def __init__(self, ecam: int, window: tuple[int, int]) -> None:
        self.lock = threading.RLock()
        self._ecam = ecam
        self._next, self._end = window[0], window[0] + window[1]
        self._functions: list[PciFunction] = []

    @property
    def functions(self) -> Sequence[PciFunction]:
        """The functions, by their device numbers."""
        return tuple(self._functions)

    def add(self, function: PciFunction) -> int:
        """Put a function into the next place, and its BARs into the window; return its number.

        Raises:
            PciBusFullError: there is no room.
        """
        if len(self._functions) == MAX_FUNCTIONS:
            raise PciBusFullError("device")
        for bar in function.bars:
            at = -(-self._next // bar.size) * bar.size
            if at + bar.size > self._end:
                raise PciBusFullError(f"{bar.size >> 10} KiB")
            function.place_bar(bar, at)
            self._next = at + bar.size
        self._functions.append(function)
        return len(self._functions) - 1

    def read(self, gpa: int, size: int) -> bytes | None:
        """Return what the guest reads at a GPA; None where nothing of the bus answers."""
        with self.lock:
            if 0 <= gpa - self._ecam < ECAM_SIZE:
                return self.read_config(gpa - self._ecam, size)
            for function, bar, offset in self._at(gpa, size):
                return function.read_bar(bar, offset, size)
        return None

    def write(self, gpa: int, data: bytes) -> bool:
        """Take what the guest writes to a GPA; return whether something of the bus answers."""
        with self.lock:
            if 0 <= gpa - self._ecam < ECAM_SIZE:
                self.write_config(gpa - self._ecam, data)
                return True
            for function, bar, offset in self._at(gpa, len(data)):
                function.write_bar(bar, offset, data)
                return True
        return False

    def read_config(self, place: int, size: int) -> bytes:
        """Return bytes at a place in the configuration space, as ECAM orders it."""
        with self.lock:
            function, offset = self._at_place(place)
            return function.read_config(offset, size) if function else b"\xff" * size

    def write_config(self, place: int, data: bytes) -> None:
        """Take what the guest writes to a place in the configuration space."""
        with self.lock:
            function, offset = self._at_place(place)
            if function:
                function.write_config(offset, data)

    def _at_place(self, place: int) -> tuple[PciFunction | None, int]:
        one, offset = divmod(place, CONFIG_SIZE)
        device, number = divmod(one, 1 << _DEVICE_SHIFT - 12)
        if number or device >= len(self._functions):
            return None, offset
        return self._functions[device], offset

    def _at(self, gpa: int, size: int) -> list[tuple[PciFunction, Bar, int]]:
        """Return who answers at a GPA: nobody, or one, also where the guest has put several."""
        for function in self._functions:
            for bar in function.bars:
                if bar.gpa is not None and bar.gpa <= gpa and gpa + size <= bar.gpa + bar.size:
                    return [(function, bar, gpa - bar.gpa)]
        return []
