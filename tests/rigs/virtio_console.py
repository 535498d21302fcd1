"""The driver's side of a virtio console with several ports, for native tests."""

from __future__ import annotations

import struct
import time

from pykvm.devices.virtio.console import Console
from pykvm.memory.guest_memory import GuestMemory
from tests.rigs.virtio_driver import Request, VirtioDriver

__all__ = ["ConsoleDriver"]

READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
MULTIPORT, SIZE = 2, 1


class ConsoleDriver(VirtioDriver):
    """What Linux's driver does.

    Attributes:
        messages: (port, event, value, rest) that the device has sent.
        received: by port, what has come.
    """

    def __init__(
        self, console: Console, features: int, memory: GuestMemory, *, buffers: int = 4
    ) -> None:
        super().__init__(console.queue_sizes, features, memory=memory)
        self.console = console
        self.messages: list[tuple[int, int, int, bytes]] = []
        self.received: dict[int, bytes] = {}
        self.buffers = buffers

    def begin(self) -> None:
        """Fill the receive queues, start the device, and open every port that it has."""
        for queue in range(0, len(self.queues), 2):
            for _ in range(self.buffers):
                self.submit(queue, writable=[4096])
        self.start(self.console)
        if self.features & MULTIPORT:
            self.control(0, READY, 1)
            ports = [port for port, event, *_ in self.wait_messages(ADD, self.console_ports)]
            for port in ports:
                self.control(port, PORT_READY, 1)
            self.wait_messages(OPEN, self.console_ports)

    @property
    def console_ports(self) -> int:
        return len(self.console.ports)

    @staticmethod
    def rx(port: int) -> int:
        return 2 * port + 2 if port else 0

    def control(self, port: int, event: int, value: int) -> None:
        self.request(3, [struct.pack("<IHH", port, event, value)])

    def poll(self, timeout: float = 0) -> None:
        """Take what has come on every receive queue, and make its buffers available again."""
        for queue in (0, *range(2, len(self.queues), 2)):
            for request in self.completed(queue, 1 if timeout else 0, timeout):
                self._take(queue, request)

    def wait_messages(self, event: int, count: int = 1) -> list[tuple[int, int, int, bytes]]:
        """Return the messages of an event, when there are so many."""
        end = time.monotonic() + 10
        while True:
            self.poll()
            found = [message for message in self.messages if message[1] == event]
            if len(found) >= count:
                return found
            assert time.monotonic() < end, f"no message {event}: {self.messages}"
            time.sleep(0.001)

    def read(self, port: int, size: int) -> bytes:
        """Return so many bytes that have come for a port."""
        end = time.monotonic() + 10
        while len(self.received.get(port, b"")) < size:
            assert time.monotonic() < end, f"port {port} has {self.received.get(port)!r}"
            self.poll()
            time.sleep(0.0005)
        data = self.received[port]
        self.received[port] = data[size:]
        return data[:size]

    def write(self, port: int, *parts: bytes) -> Request:
        """Write, and return at once."""
        request = self.submit(self.rx(port) + 1, list(parts))
        assert request
        self.kick(self.rx(port) + 1)
        return request

    def _take(self, queue: int, request: Request) -> None:
        if queue == 2:
            port, event, value = struct.unpack_from("<IHH", request.data)
            self.messages.append((port, event, value, request.data[8:]))
        else:
            port = queue // 2 - 1 if queue else 0
            self.received[port] = self.received.get(port, b"") + request.data
        self.submit(queue, writable=[4096])
        self.kick(queue)
