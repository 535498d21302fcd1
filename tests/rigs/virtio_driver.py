"""A driver for native tests of virtio devices, without a VM: queues, buffers, requests.

For example::

    with VirtioDriver([64], Feature.EVENT_IDX | Feature.INDIRECT_DESC) as driver:
        device = Entropy(driver.memory)
        driver.start(device)
        answer = driver.request(0, writable=[16])
        assert answer.written == 16
        driver.stop(device)

`driver.queues[n]` is the ring itself (tests.rigs.virtio_rings), for what goes wrong on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.closeable import Closeable
from pykvm.devices.virtio.device import Feature, VirtioDevice
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.virtio_rings import Buffer, DriverQueue, PackedQueue, SplitQueue

__all__ = ["RING_FEATURES", "Request", "VirtioDriver"]

RING_FEATURES = [
    packed | indirect | events
    for packed in (0, int(Feature.RING_PACKED))
    for indirect in (0, int(Feature.INDIRECT_DESC))
    for events in (0, int(Feature.EVENT_IDX))
]
"""Every combination of the features that change a ring; for `pytest.mark.parametrize`."""


@dataclass(slots=True)
class Request:
    """A chain that was made available.

    Attributes:
        queue: the queue's number.
        buffers: what it is made of.
        written: bytes that the device says to have written; None before it is used.
        data: those bytes.
    """

    queue: int
    buffers: list[Buffer]
    written: int | None = None
    data: bytes = b""


class VirtioDriver(Closeable):
    """Queues of a device in guest memory of its own, and the buffers of requests.

    Args:
        sizes: of the queues.
        features: what is negotiated.
        memory: by default 16 MiB from GPA 0 on, which are closed with the driver.
        at: GPA where the queues begin.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (64,),
        features: int = 0,
        *,
        memory: GuestMemory | None = None,
        at: int = 0x1000,
    ) -> None:
        self._own = memory is None
        self.memory = memory or GuestMemory.create(16 * MIB, name="virtio")
        self.features = int(features | Feature.VERSION_1)
        kind = PackedQueue if features & Feature.RING_PACKED else SplitQueue
        self.queues: list[DriverQueue] = []
        for index, size in enumerate(sizes):
            queue = kind(self.memory, at, size, features, index=index)
            self.queues.append(queue)
            at = (queue.end + 0xFFF) & ~0xFFF
        self._next = at
        self._free: dict[int, list[int]] = {}
        self._pending: dict[tuple[int, int], Request] = {}

    def start(self, device: VirtioDevice, queues: Sequence[int] | None = None) -> None:
        """Start a device with all queues, or with those that are named, where they are now."""
        chosen = range(len(self.queues)) if queues is None else queues
        device.start(self.features, [self.queues[index].ring() for index in chosen])

    def stop(self, device: VirtioDevice) -> None:
        """Stop a device; the next start goes on there."""
        for index, base in device.stop().items():
            self.queues[index].base = base

    def reset(self) -> None:
        """Forget everything, as a driver does after it has reset its device."""
        for queue in self.queues:
            queue.reset()
        for request in self._pending.values():
            self.release(request.buffers)
        self._pending = {}

    def allocate(self, size: int) -> int:
        """Return the GPA of unused memory."""
        rounded = max(64, 1 << (size - 1).bit_length()) if size else 64
        if free := self._free.get(rounded):
            return free.pop()
        at = self._next
        self._next += rounded
        self.memory.region_at(self._next - 1)  # an error where memory ends
        return at

    def release(self, buffers: Sequence[Buffer]) -> None:
        """Give the memory of buffers back."""
        for buffer in buffers:
            rounded = max(64, 1 << (buffer.size - 1).bit_length()) if buffer.size else 64
            self._free.setdefault(rounded, []).append(buffer.gpa)

    def submit(
        self, queue: int, readable: Sequence[bytes] = (), writable: Sequence[int] = ()
    ) -> Request | None:
        """Make a request available, without a kick; None: the ring is full."""
        buffers = [Buffer(self.allocate(len(data)), len(data)) for data in readable]
        buffers += [Buffer(self.allocate(size), size, True) for size in writable]
        for buffer, data in zip(buffers, readable, strict=False):
            self.memory.write(buffer.gpa, data)
        token = self.queues[queue].make_available(buffers)
        if token is None:
            self.release(buffers)
            return None
        request = Request(queue, buffers)
        self._pending[queue, token] = request
        return request

    def kick(self, queue: int, *, always: bool = False) -> bool:
        """Kick if the device wants to be; return whether it was."""
        return self.queues[queue].notify(always=always)

    def completed(self, queue: int, count: int = 1, timeout: float = 10.0) -> list[Request]:
        """Return the requests that were used, when they are `count`, or no call comes any more."""
        done = []
        for token, written in self.queues[queue].wait_used(count, timeout):
            request = self._pending.pop((queue, token))
            data = b"".join(
                self.memory.read(buffer.gpa, buffer.size)
                for buffer in request.buffers
                if buffer.writable
            )
            request.written, request.data = written, data[:written]
            self.release(request.buffers)
            done.append(request)
        return done

    def request(
        self,
        queue: int,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        timeout: float = 10.0,
    ) -> Request:
        """Make one request, wait for it, and return it.

        Raises:
            TimeoutError: it is not used, or the device does not call.
        """
        request = self.submit(queue, readable, writable)
        assert request is not None, "the ring is full"
        self.kick(queue)
        if not self.completed(queue, 1, timeout):
            raise TimeoutError(f"queue {queue}: a request was not used")
        return request

    @property
    def pending(self) -> int:
        """Number of requests that are not used."""
        return len(self._pending)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.queues = []
        if self._own:
            self.memory.close()
