"""A virtio memory balloon: memory that a guest does without goes back to the host.

The host sets a target; the guest's driver puts so many pages into the balloon, or takes them out.
It also reports pages that are free anyway, without being asked. Either way their memory is freed,
and what the guest uses again begins as zeros. The guest tells how it is off, on demand.

Source: VIRTIO 1.2, 5.5; Linux drivers/virtio/virtio_balloon.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import DeviceStateError, DeviceType, Ring
from pykvm.devices.virtio.loop import NATIVE_FEATURES, NativeDevice
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import Region

__all__ = ["Balloon", "BalloonCounters", "BalloonFeature", "BalloonTargetError", "Statistic"]

_PAGE: Final = 4096
_CONFIG: Final = struct.Struct("<IIII")
_ACTUAL: Final = 4  # its offset
_STATISTICS_QUEUE: Final = 2


class BalloonFeature(IntFlag):
    """Feature bits (5.5.3)."""

    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    REPORTING = 1 << 5


class Statistic(IntEnum):
    """Statistics of a guest (5.5.6.4), in bytes or numbers of events."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE = 4
    TOTAL = 5
    AVAILABLE = 6
    DISK_CACHES = 7
    HUGE_PAGES_ALLOCATED = 8
    HUGE_PAGES_FAILED = 9


class BalloonTargetError(PykvmError, ValueError):
    """A size that a balloon cannot have."""


@dataclass(frozen=True, slots=True)
class BalloonCounters:
    """Totals since the device was made.

    Attributes:
        inflated: pages of 4 KiB that were put into the balloon.
        deflated: pages that the guest says to have taken out.
        reported: bytes of free memory that was reported.
        refused: pages and reports that are no RAM of the guest's.
    """

    inflated: int
    deflated: int
    reported: int
    refused: int


class Balloon(NativeDevice):
    """A balloon.

    Args:
        memory: the guest's, where its rings are.
        ram: the regions whose memory may be given back: files of anonymous memory that nobody
            shares with the guest, and of which no process relies on the contents.
    """

    type = DeviceType.BALLOON
    # Inflate, deflate, then those whose numbers depend on what was negotiated.
    queue_sizes = (128, 128, 128, 128, 128)
    features = int(
        NATIVE_FEATURES
        | BalloonFeature.STATS_VQ
        | BalloonFeature.DEFLATE_ON_OOM
        | BalloonFeature.REPORTING
    )

    def __init__(self, memory: GuestMemory, ram: Sequence[Region]) -> None:
        regions = ffi.new("struct virtio_region[]", max(len(ram), 1))
        for raw, region in zip(regions, ram, strict=False):
            raw.gpa, raw.size, raw.read_only = region.gpa, region.size, region.read_only
            raw.host = ffi.cast("uint8_t *", region.host_address)
        table = ffi.new("struct virtio_memory *", (len(ram), regions))
        super().__init__(memory, "balloon", lib.balloon_new(table), lib.balloon_free)
        self._most = sum(region.size for region in ram)
        self._target = self._actual = 0
        self._counters = ffi.new("struct balloon_counters *")

    @property
    def target(self) -> int:
        """Bytes that the balloon shall hold."""
        return self._target * _PAGE

    @target.setter
    def target(self, size: int) -> None:
        if size < 0 or size % _PAGE or size > self._most:
            raise BalloonTargetError(
                f"a balloon of {size} bytes in {self._most} of RAM",
                f"use a multiple of {_PAGE} that is smaller",
            )
        self._target = size // _PAGE
        self.on_config()

    @property
    def actual(self) -> int:
        """Bytes that the balloon holds, as the guest says."""
        return self._actual * _PAGE

    def ask(self) -> None:
        """Ask the guest for statistics; `statistics` has them when it has answered."""
        with self._lock:
            if self._device is not None:
                lib.balloon_ask(self._device)
        self._nudge()

    def statistics(self) -> dict[Statistic, int]:
        """Return what the guest has told, when its driver began and when it was asked last."""
        values = ffi.new("uint64_t[]", lib.BALLOON_STATISTICS)
        with self._lock:
            told = 0 if self._device is None else lib.balloon_statistics(self._device, values)
        return {tag: int(values[tag]) for tag in Statistic if told >> tag & 1}

    def counters(self) -> BalloonCounters:
        """Return what has passed, as of now, or until the device was closed."""
        with self._lock:
            if self._device is not None:
                lib.balloon_read_counters(self._device, self._counters)
            raw = self._counters
            return BalloonCounters(raw.inflated, raw.deflated, raw.reported, raw.refused)

    def config(self) -> bytes:
        """Return struct virtio_balloon_config (5.5.4)."""
        return _CONFIG.pack(self._target, self._actual, 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the balloon's size from the driver."""
        config = bytearray(self.config())
        config[offset : offset + len(data)] = data[: max(len(config) - offset, 0)]
        self._actual = int.from_bytes(config[_ACTUAL : _ACTUAL + 4], "little")

    def save(self) -> dict[str, int]:
        """Return target and size, in pages; what the guest has told is asked for again."""
        return {"target": self._target, "actual": self._actual}

    def restore(self, state: Any) -> None:
        """Set what `save` returned.

        Raises:
            DeviceStateError: no balloon in this memory has it.
        """
        numbers = state if isinstance(state, dict) else {}
        target, actual = numbers.get("target"), numbers.get("actual")
        if type(target) is not int or type(actual) is not int or len(numbers) != 2:
            target = actual = -1
        if not 0 <= target * _PAGE <= self._most or not 0 <= actual < 1 << 32:
            raise DeviceStateError(
                "the saved state is not that of a balloon in this memory",
                "give the machine the devices that it had",
            )
        self._target, self._actual = target, actual

    def stop(self) -> dict[int, int]:
        """Stop the thread."""
        self.counters()
        return super().stop()

    def _prepare(self, rings: Sequence[Ring]) -> None:
        """Find the queues: Linux does not count those that were not negotiated, others do."""
        features = int(self._device.features)
        statistics, reporting = -1, -1
        if features & BalloonFeature.STATS_VQ:
            statistics = _STATISTICS_QUEUE
        if features & BalloonFeature.REPORTING and rings:
            reporting = max(ring.index for ring in rings)
        if reporting in (0, 1, statistics):
            reporting = -1
        lib.balloon_set_queues(self._device, statistics, reporting)
