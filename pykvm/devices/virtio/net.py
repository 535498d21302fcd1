"""A virtio network device, between a guest and a TAP or a user-mode network, without Python.

A TAP's header is the guest's, so checksums and segmentation are left to the host where both sides
can; passt's stream has neither and takes large frames instead.

Source: VIRTIO 1.2, 5.1; Linux include/uapi/linux/virtio_net.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import DeviceType, Ring
from pykvm.devices.virtio.loop import NATIVE_FEATURES, NativeDevice
from pykvm.devices.virtio.net_features import (
    NetFeature,
    net_config,
    offloads_of,
    tap_features,
)
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.frame_stream import FrameStream
from pykvm.network.tap import Tap

__all__ = ["Net", "NetCounters"]


_OF_ALL = NetFeature.MTU | NetFeature.MAC | NetFeature.MRG_RXBUF | NetFeature.STATUS


@dataclass(frozen=True, slots=True)
class NetCounters:
    """Frames, and their bytes without headers, since the device was made.

    Attributes:
        received, received_bytes: by the guest.
        received_dropped: larger than the guest's buffers.
        sent, sent_bytes: by the guest.
        sent_dropped: not a frame, refused by the host, or sent to nobody.
    """

    received: int
    received_bytes: int
    received_dropped: int
    sent: int
    sent_bytes: int
    sent_dropped: int


class Net(NativeDevice):
    """A network interface of a guest.

    Attributes:
        on_link_lost: called with a reason, from any thread, when the other side has gone; the guest
            sees an interface without a link.

    Args:
        memory: the guest's.
        other_side: a TAP, or a stream, such as a user-mode network; closed with the device.
        mac: the guest's MAC address.
    """

    type = DeviceType.NET
    queue_sizes = (256, 256)
    stateless = True
    on_link_lost: Callable[[str], None]

    def __init__(self, memory: GuestMemory, other_side: Tap | FrameStream, mac: str) -> None:
        stream = isinstance(other_side, FrameStream)
        if isinstance(other_side, FrameStream):
            descriptor = other_side.socket.fileno()
        else:
            descriptor = other_side.descriptors[0]
        super().__init__(memory, "net", lib.net_new(descriptor, stream), lib.net_free)
        self._other_side = other_side
        self._mac = mac
        self._counters = ffi.new("struct net_counters *")
        self._told = False
        self.on_link_lost = lambda reason: None
        self.features = int(NATIVE_FEATURES | _OF_ALL)
        if isinstance(other_side, Tap):
            self.features |= tap_features(other_side)

    @property
    def link(self) -> bool:
        """Whether the other side is there."""
        return self._lost() is None

    def counters(self) -> NetCounters:
        """Return what has passed, as of now, or until the device was closed."""
        with self._lock:
            if self._device is not None:
                lib.net_read_counters(self._device, self._counters)
            raw = self._counters
            return NetCounters(
                raw.received,
                raw.received_bytes,
                raw.received_dropped,
                raw.sent,
                raw.sent_bytes,
                raw.sent_dropped,
            )

    def config(self) -> bytes:
        """Return struct virtio_net_config (5.1.4) up to the MTU."""
        return net_config(self._mac, link=self.link, mtu=self._other_side.mtu)

    def close(self) -> None:
        """Stop the device and close the other side."""
        self.stop()
        self.counters()
        super().close()
        self._other_side.close()

    def _prepare(self, rings: Sequence[Ring]) -> None:
        if isinstance(self._other_side, Tap) and self.link:
            self._other_side.set_offloads(offloads_of(int(self._device.features)))

    def _noticed(self) -> None:
        text = self._lost()
        if text is None or self._told:
            return
        self._told = True
        self.on_config()
        if isinstance(self._other_side, FrameStream):
            text = self._other_side.complaint(patience=1) or text
        else:
            text = f"{self._other_side.name}: {text}"
        self.on_link_lost(text)

    def _lost(self) -> str | None:
        with self._lock:
            reason = ffi.NULL if self._device is None else lib.net_lost(self._device)
        return None if reason == ffi.NULL else ffi.string(reason).decode()
