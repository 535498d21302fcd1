"""Interface between a transport and a virtio device.

The words are vhost's, because that is what two of three data planes understand: a device is started
with its rings, says where each of them has come to when it is stopped, and can be started there
again, by another process after a snapshot too.

Source: VIRTIO 1.2, chapters 2 and 5; Linux include/uapi/linux/vhost.h.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError

__all__ = ["NO_CALL", "DeviceStateError", "DeviceType", "Feature", "Ring", "VirtioDevice"]

NO_CALL = -1
"""`Ring.call` of a ring whose driver polls."""


class DeviceType(IntEnum):
    """Device types (5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    VSOCK = 19
    FS = 26


class Feature(IntFlag):
    """Feature bits that belong to no type of device (6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35


@dataclass(frozen=True, slots=True)
class Ring:
    """A virtqueue as its driver has set it up.

    All of it but the descriptors comes from the guest: no address has been looked at yet.

    Attributes:
        index: the queue's number.
        size: descriptors, 1 to what the device allows; a power of 2 unless the ring is packed.
        descriptors: GPA of the descriptor table, or of the packed ring.
        driver: GPA of the available ring, or of the driver's event suppression structure.
        device: GPA of the used ring, or of the device's event suppression structure.
        base: where to go on, as VHOST_SET_VRING_BASE takes it: the next available entry; of a
            packed ring also its wrap counter (bit 15), the next used one (bits 16 to 30) and its
            (bit 31).
        kick: eventfd that is written when the driver has made something available.
        call: eventfd to write when something was used and the driver wants to know; or `NO_CALL`.
    """

    index: int
    size: int
    descriptors: int
    driver: int
    device: int
    base: int
    kick: int
    call: int


class DeviceStateError(PykvmError):
    """A device whose state cannot be saved, or a state that is not the device's."""


class VirtioDevice(Closeable):
    """A virtio device without its transport.

    A transport calls the methods from one thread at a time.

    Attributes:
        type: what it is.
        queue_sizes: the most descriptors of each queue, a power of 2 each.
        features: feature bits that it offers, its own and `Feature`; VERSION_1 is the transport's.
        stateless: whether nothing but its rings and its configuration belongs to its state.
        on_failure: called, from any thread, with a reason when the data plane cannot go on; its
            driver then has to reset the device.
        on_config: called, from any thread, when `config()` has changed.
    """

    type: DeviceType
    queue_sizes: Sequence[int]
    features: int
    stateless: bool = False
    on_failure: Callable[[str], None]
    on_config: Callable[[], None]

    def __init__(self) -> None:
        self.on_failure = lambda reason: None
        self.on_config = lambda: None

    def config(self) -> bytes:
        """Return the device's configuration space (5.x.4), as it is now."""
        return b""

    def disk_files(self) -> Sequence[Path]:
        """Return the files whose contents belong to the guest's state; a snapshot names them."""
        return ()

    def save(self) -> Any:
        """Return what a snapshot has to hold beside the rings, while stopped, as values for JSON.

        Raises:
            DeviceStateError: a snapshot cannot hold it: it is in another process, for example.
        """
        if not self.stateless:
            raise DeviceStateError(
                f"a snapshot cannot hold the state of a virtio {self.type.name.lower()} device",
                "use a machine without it",
            )

    def restore(self, state: Any) -> None:
        """Set what `save` returned in a new device, before it is started.

        Raises:
            DeviceStateError: no device of this kind has it.
        """
        if not self.stateless or state is not None:
            raise DeviceStateError(
                f"the saved state is not of such a virtio {self.type.name.lower()} device",
                "give the machine the devices that it had",
            )

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what the driver writes to the configuration; most devices ignore it."""

    @abstractmethod
    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Start the data plane.

        Args:
            features: what the driver has accepted, a part of `features`, and VERSION_1.
            rings: those that the driver has enabled.

        Raises:
            PykvmError: a ring lies outside of guest memory, or the data plane refuses it.
        """

    @abstractmethod
    def stop(self) -> dict[int, int]:
        """Stop the data plane when everything that it had taken is done. Harmless twice.

        Returns:
            The `Ring.base` of each ring by its index; nothing where none was started.
        """
