"""A virtqueue in C (pykvm/devices/virtio/queue.c) for Python to take from: tests alone do that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import Ring
from pykvm.devices.virtio.memory_table import MemoryTable
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Chain", "Queue"]


@dataclass
class Chain:
    """A chain that was taken."""

    raw: Any
    iovecs: Any

    @property
    def sizes(self) -> list[int]:
        """Sizes of the iovecs, to read and then to write."""
        return [iov.iov_len for iov in self.iovecs[0 : self.raw.reads + self.raw.writes]]

    def read(self, offset: int = 0, size: int = 1 << 20) -> bytes:
        out = ffi.new("char[]", size)
        return bytes(ffi.buffer(out, lib.virtio_chain_read(self.raw, offset, out, size)))

    def write(self, data: bytes, offset: int = 0) -> int:
        return int(lib.virtio_chain_write(self.raw, offset, data, len(data)))

    def slice(self, writable: bool, offset: int, size: int, room: int = 64) -> list[int] | None:
        """Return the sizes of the iovecs that hold a part of it."""
        out = ffi.new("struct iovec[]", room)
        n: int = lib.virtio_chain_slice(self.raw, writable, offset, size, out, room)
        return None if n < 0 else [out[i].iov_len for i in range(n)]


class Queue:
    """A `struct virtqueue`.

    Attributes:
        fault: what virtqueue_init() has returned.
    """

    def __init__(
        self,
        memory: GuestMemory,
        ring: Ring,
        features: int,
        *,
        most_bytes: int = 0,
        room: int = lib.VIRTIO_CHAIN_IOVECS,
    ) -> None:
        self._table = MemoryTable(memory)
        self._room = room
        self.raw = ffi.new("struct virtqueue *")
        setup = ffi.new(
            "struct virtqueue_setup *",
            {
                "descriptors": ring.descriptors,
                "driver": ring.driver,
                "device": ring.device,
                "features": features,
                "most_bytes": most_bytes,
                "size": ring.size,
                "base": ring.base,
                "kick": ring.kick,
                "call": ring.call,
            },
        )
        self.fault: int = lib.virtqueue_init(self.raw, self._table.raw, setup)

    @property
    def reason(self) -> str:
        """Why the queue is broken."""
        return str(ffi.string(lib.virtqueue_reason(self.raw.broken)).decode())

    @property
    def base(self) -> int:
        return int(lib.virtqueue_base(self.raw))

    def take(self) -> Chain | None:
        """Return a chain; None: there is none, or the queue is broken."""
        iovecs = ffi.new("struct iovec[]", max(self._room, 1))
        raw = ffi.new("struct virtio_chain *", {"iov": iovecs, "room": self._room})
        taken: int = lib.virtqueue_take(self.raw, raw)
        assert (taken < 0) == bool(self.raw.broken)
        return Chain(raw, iovecs) if taken > 0 else None

    def untake(self, chain: Chain) -> None:
        lib.virtqueue_untake(self.raw, chain.raw)

    def put(self, chain: Chain, written: int = 0) -> None:
        lib.virtqueue_put(self.raw, chain.raw, written)

    def flush(self) -> bool:
        return bool(lib.virtqueue_flush(self.raw))

    def enable_kicks(self) -> bool:
        return bool(lib.virtqueue_enable_kicks(self.raw))

    def disable_kicks(self) -> None:
        lib.virtqueue_disable_kicks(self.raw)
