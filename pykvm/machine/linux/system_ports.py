"""Devices at I/O ports that images without drivers of their own expect, as QEMU has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pykvm.devices.debug_exit import DebugExit
from pykvm.devices.firmware_config import FirmwareConfig
from pykvm.devices.pci.bus import PciBus
from pykvm.devices.pci.ports import ConfigPorts
from pykvm.devices.ports import PortBus
from pykvm.errors import PykvmError
from pykvm.machine.linux.config import MachineConfig

__all__ = ["SystemPorts"]


class SystemPorts:
    """The way to end a machine with a status, the configuration of firmware, and PCI by ports.

    Args:
        bus: where `add` puts them.
        config: the machine's configuration.
        pci: the machine's PCI bus.
        leave: called with the status when the guest ends the machine.
    """

    def __init__(
        self, bus: PortBus, config: MachineConfig, pci: PciBus, leave: Callable[[int], None]
    ) -> None:
        self._bus = bus
        self._exit = DebugExit(leave)
        self._firmware = FirmwareConfig(config.cpus, config.memory)
        self._pci = ConfigPorts(pci)
        self._there = False

    def add(self) -> None:
        """Put the devices where a guest finds them."""
        self._there = True
        for device in (self._exit, self._firmware, self._pci):
            self._bus.add(device)

    def save(self) -> Any:
        """Return their state as values for JSON; None where they are not there."""
        if not self._there:
            return None
        return {"firmware": self._firmware.rest.hex(), "pci": self._pci.address}

    def restore(self, state: Any) -> None:
        """Add them if they were there, as they were.

        Raises:
            PykvmError: it is another device's state.
        """
        if state is None:
            return
        self.add()
        try:
            self._firmware.rest = bytes.fromhex(state["firmware"])
            self._pci.address = int(state["pci"]) & 0xFFFF_FFFF
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PykvmError(
                "the saved state is not of a machine's ports", "use another copy of the snapshot"
            ) from error
