"""A virtio device whose rings the kernel serves: what vhost-net and vhost-vsock have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

from pykvm.devices.virtio.device import DeviceType, Ring, VirtioDevice
from pykvm.devices.virtio.failure_watch import FailureWatch
from pykvm.devices.virtio.ring_memory import check_rings
from pykvm.devices.virtio.vhost_kernel import VhostError, VhostKernel
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["VhostKernelDevice"]


class VhostKernelDevice(VirtioDevice):
    """A device of a vhost handle.

    Args:
        type: what the driver is told that it is.
        vhost: the handle; the device owns it from now on.
        name: of the kernel's device, in messages.
        memory: the guest's; its writable regions are the kernel's to use.
        queue_sizes: the most descriptors of each queue.
        features: what is offered.
        served: number of queues, from the first on, that the kernel serves.
        broken: descriptors, and what to call when one has an error.
    """

    def __init__(
        self,
        type: DeviceType,
        vhost: VhostKernel,
        name: str,
        memory: GuestMemory,
        *,
        queue_sizes: Sequence[int],
        features: int,
        served: int,
        broken: Mapping[int, Callable[[], None]],
    ) -> None:
        super().__init__()
        self.type = type
        self.queue_sizes = tuple(queue_sizes)
        self.features = features
        self._vhost = vhost
        self._memory = memory
        self._served = served
        self._rings: tuple[Ring, ...] = ()
        self._error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._name = name
        self._told = False
        self._watch = FailureWatch(name, {self._error: self._ring_failed}, broken)

    def _ring_failed(self) -> None:
        told, self._told = self._told, True
        if not told:  # a driver can have the kernel complain with each notification
            self.on_failure(f"{self._name} has met an error in a virtqueue")

    @abstractmethod
    def _run(self, rings: Sequence[Ring]) -> None:
        """Let rings that are set up run."""

    @abstractmethod
    def _halt(self, rings: Sequence[Ring]) -> None:
        """Stop rings, whether or not they run."""

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Hand the rings to the kernel.

        Raises:
            RingAddressError: a ring is not in guest memory.
            VhostError: the kernel refuses something.
            ForkedProcessError: the device works for the parent process.
        """
        regions = [region for region in self._memory.regions if not region.read_only]
        check_rings(rings, features, self.queue_sizes, regions)
        self._vhost.set_features(features)
        self._vhost.set_memory(regions)
        self._rings = tuple(rings)
        self._told = False
        served = self._served_rings()
        try:
            for ring in served:
                self._vhost.set_ring(ring, self._memory, self._error)
            self._run(served)
        except BaseException:
            self.stop()
            raise
        for ring in served:
            os.eventfd_write(ring.kick, 1)  # what was made available before is not kicked again

    def stop(self) -> dict[int, int]:
        """Take the rings back when what the kernel had taken of them is done."""
        served, rings, self._rings = self._served_rings(), self._rings, ()
        if not rings:
            return {}
        bases = {ring.index: ring.base for ring in rings}  # a ring that nobody serves stays there
        try:
            self._halt(served)
            bases |= {ring.index: self._vhost.base(ring.index) for ring in served}
        except VhostError as error:
            self.on_failure(str(error))
            return {}
        return bases

    def _served_rings(self) -> list[Ring]:
        return [ring for ring in self._rings if ring.index < self._served]

    def close(self) -> None:
        """Close the handle, by which its rings stop. Harmless twice."""
        error, self._error = self._error, -1
        if error < 0:
            return
        self._rings = ()
        self._watch.close()
        self._vhost.close()
        os.close(error)
