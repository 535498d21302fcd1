"""QEMU's configuration device, by which firmware asks for a machine's memory and processors.

Images without ACPI ask too: kvm-unit-tests wait for as many processors as it names.

Source: QEMU docs/specs/fw_cfg.rst; include/standard-headers/linux/qemu_fw_cfg.h.
"""

from typing import Final

__all__ = ["FirmwareConfig"]

_SELECTOR: Final = 0x510
_DATA: Final = 0x511

_SIGNATURE: Final = 0x00
_VERSION: Final = 0x01
_MEMORY: Final = 0x03
_CPUS: Final = 0x05
_MOST_CPUS: Final = 0x0F


class FirmwareConfig:
    """The device, without files and without DMA.

    Attributes:
        rest: what is still to be read of the selected item.

    Args:
        cpus: number of processors.
        memory: bytes of RAM.
    """

    ports: Final = range(_SELECTOR, _DATA + 1)

    def __init__(self, cpus: int, memory: int) -> None:
        self._items = {
            _SIGNATURE: b"QEMU",
            _VERSION: (1).to_bytes(4, "little"),
            _MEMORY: memory.to_bytes(8, "little"),
            _CPUS: cpus.to_bytes(2, "little"),
            _MOST_CPUS: cpus.to_bytes(2, "little"),
        }
        self.rest = b""

    def read_port(self, port: int, size: int) -> bytes | None:
        """Return the next byte of the item, zero behind its end; there is no wider access."""
        if port != _DATA or size != 1:
            return None
        rest = self.rest
        self.rest = rest[1:]
        return rest[:1] or b"\0"

    def write_port(self, port: int, data: bytes) -> None:
        """Select an item, to be read from its start; those that are not there are empty."""
        if port == _SELECTOR and len(data) == 2:
            self.rest = self._items.get(int.from_bytes(data, "little"), b"")
