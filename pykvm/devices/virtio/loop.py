"""Base class of virtio devices whose data plane is a thread in C (loop.h).

A subclass makes its C device, offers features, queues and a configuration, and says what it does on
news from C; `pykvm.devices.virtio.entropy` is the smallest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import Feature, Ring, VirtioDevice
from pykvm.devices.virtio.memory_table import MemoryTable
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["NATIVE_FEATURES", "DataPlaneError", "NativeDevice", "RingError"]

NATIVE_FEATURES: Final = int(Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED)
"""Features of queue.c, for any device."""


class RingError(PykvmError, ValueError):
    """A ring, as the driver has set it up, that cannot be used."""


class DataPlaneError(PykvmError):
    """The host has no thread or descriptor for a data plane."""


class NativeDevice(VirtioDevice):
    """A device whose rings are served by a thread in C.

    Args:
        memory: the guest's; it keeps its regions while the device runs.
        name: of the thread, and in messages; at most 15 bytes.
        raw: the C device; NULL raises MemoryError.
        free: frees it.
    """

    def __init__(
        self, memory: GuestMemory, name: str, raw: Any, free: Callable[[Any], None]
    ) -> None:
        super().__init__()
        if raw == ffi.NULL:
            raise MemoryError(f"no memory for a device: {name}")
        self.name = name
        self._memory = memory
        self._device: Any = ffi.gc(raw, free)
        self._loop: Any = None
        self._table: MemoryTable | None = None
        self._rings: list[int] = []
        self._events = -1
        self._lock = threading.Lock()
        """Between start, stop, close and whoever uses `_loop` or `_device` in another thread."""

    @property
    def running(self) -> bool:
        return self._loop is not None

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Start the thread.

        Raises:
            RingError: a ring is outside of guest memory, or its size or base is not valid.
            DataPlaneError: the host has no thread or descriptor for it.
            ForkedProcessError: the device belongs to the parent process.
        """
        self.require_own(f"the {self.name} device")
        if self._device is None:
            raise DataPlaneError(f"the {self.name} device is closed", "make another one")
        self.stop()
        self._watch()
        self._device.features = features
        table = MemoryTable(self._memory)
        raw = lib.virtio_loop_new(self._device, len(self.queue_sizes), self._events)
        if raw == ffi.NULL:
            raise self._refused(ffi.errno)
        held = self._device, table  # a loop that nobody stops outlives neither

        def free(raw: Any, _held: Any = held) -> None:
            if not table.inherited:  # a forked process has no thread that could be stopped
                lib.virtio_loop_free(raw)

        loop = ffi.gc(raw, free)
        for ring in rings:
            self._add(loop, table, ring)
        self._prepare(rings)
        with self._lock:
            if error := lib.virtio_loop_start(loop, self.name.encode()):
                raise self._refused(error)
            self._loop, self._table = loop, table
            self._rings = [ring.index for ring in rings]

    def stop(self) -> dict[int, int]:
        if self.inherited:  # neither the thread nor who may hold the lock is in this process
            self._loop, self._lock = None, threading.Lock()
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is None:
                return {}
            lib.virtio_loop_stop(loop)
            bases = {index: int(lib.virtio_loop_base(loop, index)) for index in self._rings}
            ffi.release(loop)
            self._table = None
        return bases

    def close(self) -> None:
        """Stop the thread, and close what the device has open."""
        self.stop()
        with self._lock:
            device, self._device = self._device, None
        if device is not None:
            ffi.release(device)
        events, self._events = self._events, -1
        if events >= 0 and not self.inherited:
            os.eventfd_write(events, 1)  # the thread that waits for it closes it
        elif events >= 0:
            os.close(events)

    def _prepare(self, rings: Sequence[Ring]) -> None:
        """Do what has to be done before the thread starts."""

    def _noticed(self) -> None:
        """Look at what the C device has told, in a thread of its own.

        Hold `_lock` while using `_device`, which is None once the device is closed.
        """

    def _nudge(self) -> None:
        """Call the C device's nudged(), if it runs."""
        with self._lock:
            if self._loop is not None:
                lib.virtio_loop_nudge(self._loop)

    def _add(self, loop: Any, table: MemoryTable, ring: Ring) -> None:
        if not 0 <= ring.index < len(self.queue_sizes):
            raise RingError(
                f"queue {ring.index} of the {self.name} device",
                f"use one of its {len(self.queue_sizes)} queues",
            )
        most = self.queue_sizes[ring.index]
        setup = ffi.new(
            "struct virtqueue_setup *",
            {
                "descriptors": ring.descriptors,
                "driver": ring.driver,
                "device": ring.device,
                "size": ring.size,
                "base": ring.base,
                "kick": ring.kick,
                "call": ring.call,
            },
        )
        fault: int = lib.virtio_loop_add(loop, ring.index, table.raw, setup)
        if ring.size > most:
            fault = lib.VIRTQUEUE_BAD_SIZE
        if fault:
            reason = ffi.string(lib.virtqueue_reason(fault)).decode()
            raise RingError(
                f"queue {ring.index} of the {self.name} device has {reason}",
                "the driver has to reset the device",
            )

    def _refused(self, error: int) -> DataPlaneError:
        return DataPlaneError(
            f"no thread for the {self.name} device: {os.strerror(error)}",
            "raise the limits of processes and open files (ulimit -u, -n)",
        )

    def _watch(self) -> None:
        """Start the thread that waits for news from C, once."""
        if self._events >= 0:
            return
        self._events = os.eventfd(0, os.EFD_CLOEXEC)
        name = f"{self.name}-events"
        threading.Thread(target=self._wait, args=(self._events,), name=name, daemon=True).start()

    def _wait(self, events: int) -> None:
        while True:
            os.eventfd_read(events)
            if self._events != events:
                os.close(events)
                return
            with self._lock:
                reason = ffi.NULL if self._loop is None else lib.virtio_loop_failure(self._loop)
            self._noticed()
            if reason != ffi.NULL:
                self.on_failure(ffi.string(reason).decode())
