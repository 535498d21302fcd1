"""A driver of a virtio network device for native tests, and a guest's interface made with it."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import threading

from pykvm.closeable import Closeable
from pykvm.devices.virtio.device import VirtioDevice
from pykvm.devices.virtio.net_features import NetFeature
from pykvm.memory.guest_memory import GuestMemory
from pykvm.network.tap import Offload, Tap
from pykvm.sizes import MIB
from tests.rigs.network_namespace import NetworkNamespace
from tests.rigs.virtio_driver import VirtioDriver

__all__ = ["GuestInterface", "NetDriver"]

RECEIVE, TRANSMIT = 0, 1
HEADER = 12


class NetDriver(VirtioDriver):
    """Queues for frames.

    Args:
        features: what is negotiated.
        size: entries of each queue.
        buffer: bytes of each buffer for a frame, or a part of one.
    """

    def __init__(self, features: int = 0, *, size: int = 64, buffer: int = 2048) -> None:
        self._guest = GuestMemory.create(64 * MIB, name="net")
        super().__init__([size, size], features, memory=self._guest)
        self._buffer = buffer
        self._mergeable = bool(features & NetFeature.MRG_RXBUF)
        self._parts: list[bytes] = []

    def offer(self, count: int | None = None) -> int:
        """Make buffers available, or as many as the ring takes; return their number."""
        offered = 0
        while count is None or offered < count:
            if self.submit(RECEIVE, writable=[self._buffer]) is None:
                break
            offered += 1
        self.kick(RECEIVE)
        return offered

    def send(self, frame: bytes, header: bytes = bytes(HEADER)) -> bool:
        """Send a frame; return False if the ring is full."""
        if self.submit(TRANSMIT, [header, frame]) is None:
            return False
        self.kick(TRANSMIT)
        return True

    def received(self, count: int, timeout: float = 10.0) -> list[tuple[bytes, bytes]]:
        """Return frames with their headers when they are `count`, or when no more come."""
        found: list[tuple[bytes, bytes]] = []
        while True:
            for request in self.completed(RECEIVE, 0):
                self._parts.append(request.data)
                start = b"".join(self._parts[:3])  # a header may lie in several
                wanted = struct.unpack_from("<H", start, 10)[0] if len(start) >= HEADER else 0
                assert self._mergeable or wanted == 1
                if len(self._parts) == wanted:
                    whole = b"".join(self._parts)
                    self._parts = []
                    found.append((whole[:HEADER], whole[HEADER:]))
            if len(found) >= count or not self.queues[RECEIVE].wait_call(timeout):
                return found

    def close(self) -> None:
        super().close()
        self._guest.close()


class GuestInterface(Closeable):
    """An interface "eth0" in a namespace of its own, whose frames go through a device's rings.

    This host's kernel plays the guest's, with its offloads.

    Args:
        device: the device.
        mac: MAC address.
        address: IPv4 address with prefix.
        gateway: of the default route.
        features: ring features.
    """

    def __init__(
        self, device: VirtioDevice, driver: NetDriver, mac: str, address: str, gateway: str = ""
    ) -> None:
        self.namespace = NetworkNamespace()
        self._device, self._driver = device, driver
        with self.namespace.entered():
            self._tap = Tap("eth0", bridge="none", mtu=struct.unpack("<H", device.config()[10:])[0])
            if driver.features & NetFeature.HOST_TSO4:
                self._tap.set_offloads(Offload.CSUM | Offload.TSO4 | Offload.TSO6)
            commands = [f"link set eth0 address {mac}", f"addr add {address} dev eth0"]
            if gateway:
                commands += [f"route add default via {gateway}"]
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True)
            # passt believes the last frame's source, and those may have an earlier address.
            with contextlib.suppress(BlockingIOError):
                while os.read(self._tap.descriptors[0], 70000):
                    pass
        driver.start(device)
        driver.offer()
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        os.close(self._end)
        self._thread.join(10)
        os.close(self._ended)
        self._driver.stop(self._device)
        self._tap.close()
        self.namespace.close()

    def _run(self) -> None:
        driver, tap = self._driver, self._tap.descriptors[0]
        calls = [queue.call for queue in driver.queues]
        waiting: bytes | None = None
        while True:
            wanted = [*calls, self._ended] + ([tap] if waiting is None else [])
            ready = select.select(wanted, [], [])[0]
            if self._ended in ready:
                return
            for call in calls:
                if call in ready:
                    os.eventfd_read(call)
            driver.completed(TRANSMIT, 0)
            with contextlib.suppress(BlockingIOError):
                for _ in range(16):
                    frame = os.read(tap, 70000) if waiting is None else waiting
                    waiting = None if driver.send(frame[HEADER:], frame[:HEADER]) else frame
                    if waiting is not None:
                        break
            for header, frame in driver.received(0):
                os.write(tap, header[:10] + bytes(2) + frame)
            driver.offer()
