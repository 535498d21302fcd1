"""Configuration space by ports: an address register, and a window of four bytes to what it names.

Linux does without where the firmware's tables describe ECAM: with these ports it makes two
accesses of each to the first 256 bytes, and before it takes them it looks for a host bridge.

Source: PCI Local Bus Specification 3.0, 3.2.2.3.2; Linux arch/x86/pci (direct.c, common.c).
"""

from typing import Final

from pykvm.devices.pci.bus import PciBus

__all__ = ["ConfigPorts"]

_ADDRESS: Final = 0xCF8
_DATA: Final = 0xCFC
_ENABLE: Final = 1 << 31
_REGISTER: Final = 0xFC
_FUNCTION: Final = 0xFF00
_BUS: Final = 0xFF_0000
_FUNCTION_SHIFT: Final = 4  # from the address register to ECAM, where each function has 4 KiB


class ConfigPorts:
    """The ports of a bus. Only an access of four bytes reaches the address register.

    Attributes:
        address: the address register.

    Args:
        bus: the bus, number 0.
    """

    ports: Final = range(_ADDRESS, _DATA + 4)

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus
        self.address = 0

    def read_port(self, port: int, size: int) -> bytes | None:
        """Return the address register, or bytes of the configuration space."""
        address = self.address
        if port == _ADDRESS and size == 4:
            return address.to_bytes(4, "little")
        place = _place(address, port, size)
        return None if place is None else self._bus.read_config(place, size)

    def write_port(self, port: int, data: bytes) -> None:
        """Set the address register, or write to the configuration space."""
        if port == _ADDRESS and len(data) == 4:
            # Bits 30 to 24 are reserved, the lowest two always 0.
            self.address = int.from_bytes(data, "little") & (_ENABLE | 0xFF_FFFC)
            return
        place = _place(self.address, port, len(data))
        if place is not None:
            self._bus.write_config(place, data)


def _place(address: int, port: int, size: int) -> int | None:
    """Return where the bus has what an access of the window reaches."""
    if not address & _ENABLE or address & _BUS or not _DATA <= port <= _DATA + 4 - size:
        return None
    return (address & _FUNCTION) << _FUNCTION_SHIFT | (address & _REGISTER) + port - _DATA
