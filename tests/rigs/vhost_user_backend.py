"""A vhost-user back end in Python, for what goes right and for what a back end can do wrong.

Its parsing is its own: what the front end packs is read here by the specification alone.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable

from pykvm.closeable import Closeable
from pykvm.devices.virtio.device import NO_CALL, DeviceType, Ring
from pykvm.devices.virtio.vhost_user import VhostUserDevice
from pykvm.devices.virtio.vhost_user_connection import VhostUserConnection
from pykvm.memory.guest_memory import GuestMemory

__all__ = [
    "CONFIG",
    "PROTOCOL_FEATURES",
    "VERSION_1",
    "VhostUserBackend",
    "device_of",
    "give_back",
    "ring",
]

VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
CONFIG = bytes(range(100, 160))


class VhostUserBackend(Closeable):
    """A back end on one end of a socket pair, in a thread.

    Attributes:
        log: (request, payload, number of descriptors) of each message, in order.
        fds: the last descriptors of each request, by its number, and of rings by (number, index).
        memory: (gpa, size, file offset, descriptor) of what is mapped.
        answers: replaces the reply to a request: bytes are sent as they are, None sends nothing,
            and a function is called for them.
        status: what acknowledgements say, by request.
    """

    def __init__(
        self,
        *,
        features: int = VERSION_1 | PROTOCOL_FEATURES | 1 << 28 | 1 << 29 | 0b1011,
        protocol: int = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9,
        queues: int = 4,
        timeout: float = 5.0,
    ) -> None:
        self.features = features
        self.protocol = protocol
        self.queues = queues
        self.config = CONFIG
        self.slots = 32
        self.log: list[tuple[int, bytes, int]] = []
        self.fds: dict[int | tuple[int, int], list[int]] = {}
        self.memory: list[tuple[int, int, int, int]] = []
        self.answers: dict[int, bytes | Callable[[], bytes | None] | None] = {}
        self.status: dict[int, int] = {}
        self.bases: dict[int, int] = {}
        self._opened: list[int] = []
        ours, self._socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection = VhostUserConnection(ours, "the test's back end", timeout)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests so far."""
        return [code for code, _, _ in self.log]

    def read(self, gpa: int, size: int) -> bytes:
        """Read guest memory through the descriptors that came."""
        for start, length, offset, fd in self.memory:
            if start <= gpa < start + length:
                with mmap.mmap(fd, length, offset=offset) as mapped:
                    return mapped[gpa - start : gpa - start + size]
        raise AssertionError(f"no memory at {gpa:#x}")

    def channel(self) -> socket.socket:
        """Return the back end's own channel."""
        return socket.socket(fileno=os.dup(self.fds[21][0]))

    def hang_up(self) -> None:
        """Close the connection."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._receive():
                self._serve(*message)

    def _receive(self) -> tuple[int, int, bytes, list[int]] | None:
        head, rights, _, _ = self._socket.recvmsg(12, socket.CMSG_SPACE(32 * 4))
        if len(head) < 12:
            return None
        fds = array.array("i")
        for level, kind, data in rights:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(data)
        self._opened += fds
        code, flags, size = struct.unpack("=III", head)
        assert flags & 3 == 1
        payload = self._socket.recv(size, socket.MSG_WAITALL) if size else b""
        assert len(payload) == size
        return code, flags, payload, list(fds)

    def _serve(self, code: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.log.append((code, payload, len(fds)))
        if fds:
            self.fds[code] = fds
            if code in (12, 13, 14):
                self.fds[code, payload[0]] = fds
        reply = self._meet(code, payload, fds)
        if code in self.answers:
            given = self.answers[code]
            data = given() if callable(given) else given
            if data is not None:
                self._socket.sendall(data)
        elif reply is not None:
            self._socket.sendall(struct.pack("=III", code, 5, len(reply)) + reply)
        elif flags & 8:
            status = struct.pack("=Q", self.status.get(code, 0))
            self._socket.sendall(struct.pack("=III", code, 5, 8) + status)

    def _meet(self, code: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Do what a request asks for; return its reply, or None where it has none."""
        numbers = {1: self.features, 15: self.protocol, 17: self.queues, 36: self.slots}
        if code in numbers:
            return struct.pack("=Q", numbers[code])
        match code:
            case 24:
                offset, size, _ = struct.unpack_from("=III", payload)
                return payload[:12] + self.config[offset : offset + size]
            case 25:
                offset, size, _ = struct.unpack_from("=III", payload)
                self.config = self.config[:offset] + payload[12:] + self.config[offset + size :]
            case 10:
                index, base = struct.unpack("=II", payload)
                self.bases[index] = base
            case 11:
                index, _ = struct.unpack("=II", payload)
                return struct.pack("=II", index, self.bases.get(index, 0) + 7)
            case 5:
                count, _ = struct.unpack_from("=II", payload)
                regions = list(struct.iter_unpack("=QQQQ", payload[8:]))
                assert count == len(regions) == len(fds)
                self.memory = [
                    (gpa, size, offset, fd)
                    for (gpa, size, _, offset), fd in zip(regions, fds, strict=True)
                ]
            case 37:
                _, gpa, size, _, offset = struct.unpack("=QQQQQ", payload)
                self.memory.append((gpa, size, offset, fds[0]))
            case 38:
                _, gpa, size, _, _ = struct.unpack("=QQQQQ", payload)
                assert not fds
                (gone,) = [one for one in self.memory if one[:2] == (gpa, size)]
                self.memory.remove(gone)
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()
        self.connection.close()
        while self._opened:
            os.close(self._opened.pop())


def device_of(
    backend: VhostUserBackend, memory: GuestMemory, queues: int = 2, config_size: int = 60
) -> VhostUserDevice:
    """Return a disk of the back end."""
    return VhostUserDevice(
        DeviceType.BLOCK,
        backend.connection,
        memory,
        queue_sizes=[64] * queues,
        config_size=config_size,
    )


def ring(index: int = 0, *, base: int = 0, at: int = 0x1000, call: bool = True) -> Ring:
    """Return a ring of 64 descriptors, with eventfds to give back."""
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    called = os.eventfd(0, os.EFD_NONBLOCK) if call else NO_CALL
    return Ring(index, 64, at, at + 0x400, at + 0x500, base, kick, called)


def give_back(*rings: Ring) -> None:
    """Close the eventfds of rings."""
    for one in rings:
        os.close(one.kick)
        if one.call != NO_CALL:
            os.close(one.call)
