"""I/O ports of devices that are served by Python: those that a guest rarely touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pykvm.errors import PykvmError
from pykvm.kvm import Io

__all__ = ["PortBus", "PortDevice", "PortOverlapError"]


class PortOverlapError(PykvmError):
    """Two devices at one port."""


class PortDevice(Protocol):
    """A device with I/O ports. Any number of vCPU threads may call it.

    Attributes:
        ports: its ports.
    """

    @property
    def ports(self) -> range: ...

    def read_port(self, port: int, size: int) -> bytes | None:
        """Return what a guest reads by an access of `size` bytes that begins at one of its ports.

        None means that nothing answers.
        """

    def write_port(self, port: int, data: bytes) -> None:
        """Take what a guest writes by one access that begins at one of its ports."""


class PortBus:
    """The devices of a machine that have ports; nothing is elsewhere, which reads as ones."""

    def __init__(self) -> None:
        self._devices: list[PortDevice] = []

    @property
    def devices(self) -> Sequence[PortDevice]:
        """The devices, in the order in which they were added."""
        return tuple(self._devices)

    def add(self, device: PortDevice) -> None:
        """Add a device, before the machine runs.

        Raises:
            PortOverlapError: another one has one of its ports.
        """
        for other in self._devices:
            if max(device.ports[0], other.ports[0]) <= min(device.ports[-1], other.ports[-1]):
                raise PortOverlapError(
                    f"ports {device.ports[0]:#x} to {device.ports[-1]:#x} are taken in part",
                    "choose others",
                )
        self._devices.append(device)

    def serve(self, exit: Io) -> bytes:
        """Serve an exit; return the reply to input, which is empty for output.

        The accesses of a string instruction come one after the other.
        """
        device = next((one for one in self._devices if exit.port in one.ports), None)
        reply = b""
        for number in range(exit.count):
            if exit.is_write:
                if device:
                    at = number * exit.size
                    device.write_port(exit.port, exit.data[at : at + exit.size])
            else:
                read = device.read_port(exit.port, exit.size) if device else None
                reply += b"\xff" * exit.size if read is None else read
        return reply
