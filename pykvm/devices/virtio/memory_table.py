"""Guest memory as virtio devices in C see it: a table of regions with their host addresses."""

from __future__ import annotations

from typing import Any

from pykvm.closeable import ForkAware
from pykvm.devices.virtio._virtio import ffi
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["MemoryTable"]


class MemoryTable(ForkAware):
    """A `struct virtio_memory` of all regions that a guest has now.

    What is added to the memory later is not in it. While a queue uses the table, no region may be
    removed from the memory, and the memory may not be closed.

    Attributes:
        raw: the structure, for C; valid as long as this object.
    """

    def __init__(self, memory: GuestMemory) -> None:
        slots = list(memory.slots())
        self._memory = memory
        self._regions = ffi.new("struct virtio_region[]", max(len(slots), 1))
        for region, slot in zip(self._regions, slots, strict=False):
            region.gpa, region.size, region.read_only = slot.gpa, slot.size, slot.read_only
            region.host = ffi.cast("uint8_t *", slot.host_address)
        self.raw: Any = ffi.new("struct virtio_memory *", (len(slots), self._regions))
