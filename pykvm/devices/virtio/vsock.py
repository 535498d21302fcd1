"""Sockets between host and guest (vhost-vsock): the host's programs use AF_VSOCK.

Source: VIRTIO 1.2, 5.10; Linux drivers/vhost/vsock.c.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pykvm.devices.virtio._vhost import ffi
from pykvm.devices.virtio.device import DeviceType, Feature, Ring
from pykvm.devices.virtio.vhost_kernel import VhostError, VhostKernel
from pykvm.devices.virtio.vhost_kernel_device import VhostKernelDevice
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["VHOST_VSOCK", "CidError", "VhostVsock"]

VHOST_VSOCK: Final = Path("/dev/vhost-vsock")

_CIDS: Final = range(3, 0xFFFF_FFFF)
"""Context IDs of guests (5.10.4.1): 0 and 1 are reserved, 2 is the host."""

_QUEUE_SIZES: Final = (128, 128, 16)  # received packets, packets to send, events
_SERVED: Final = 2
"""Queues of the kernel. The events' tell of a guest that was moved to another host."""

_F_SEQPACKET: Final = 1 << 1
_OF_THE_KERNEL: Final = Feature.INDIRECT_DESC | Feature.EVENT_IDX | _F_SEQPACKET


class CidError(VhostError, ValueError):
    """A context ID that a guest cannot have, or that another one has."""


class VhostVsock(VhostKernelDevice):
    """A socket device.

    Args:
        cid: the guest's context ID, 3 to 2^32 - 2; one for each guest of a host.
        memory: the guest's.
        path: the device.

    Raises:
        CidError: the guest cannot have it.
        VhostError: there is no vhost-vsock, or this user may not use it.
    """

    def __init__(self, cid: int, memory: GuestMemory, *, path: Path = VHOST_VSOCK) -> None:
        if cid not in _CIDS:
            raise CidError(f"context id {cid}", f"use {_CIDS.start} to {_CIDS.stop - 1}")
        vhost = VhostKernel(path, "vhost_vsock")
        try:
            vhost.set_guest_cid(cid)
        except VhostError as error:
            vhost.close()
            if error.errno == errno.EADDRINUSE:
                raise CidError(
                    f"context id {cid} is another guest's", "use another one", errno=error.errno
                ) from error
            raise
        config: Any = ffi.new("struct virtio_vsock_config *", {"guest_cid": cid})
        self._config = bytes(ffi.buffer(config))
        super().__init__(
            DeviceType.VSOCK,
            vhost,
            "vhost-vsock",
            memory,
            queue_sizes=_QUEUE_SIZES,
            features=vhost.features & _OF_THE_KERNEL,
            served=_SERVED,
            broken={},
        )

    def config(self) -> bytes:
        """Return the guest's context ID (5.10.4)."""
        return self._config

    def _run(self, rings: Sequence[Ring]) -> None:
        # The kernel wants both rings set up.
        if len(rings) == _SERVED:
            self._vhost.set_running(True)

    def _halt(self, rings: Sequence[Ring]) -> None:
        self._vhost.set_running(False)
