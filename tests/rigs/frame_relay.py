"""A guest without a machine: a network namespace whose one interface is joined to a stream socket.

The kernel of this host plays the guest's part. The relay is slow and in Python: it is for tests.
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import threading

from pykvm.network.tap import Tap
from tests.rigs.network_namespace import NetworkNamespace

_HEADER = bytes(12)


class FrameRelay:
    """A namespace with an interface "eth0", whose frames go over `stream` with their lengths.

    Args:
        stream: the other side's socket, as `UserNetwork` has it.
        mac: MAC address of eth0.
        address: its IPv4 address with prefix.
        gateway: its default route.
    """

    def __init__(self, stream: socket.socket, mac: str, address: str, gateway: str) -> None:
        self.namespace = NetworkNamespace()
        self._stream = stream
        with self.namespace.entered():
            self._tap = Tap("eth0", bridge="none")
            for command in (
                f"link set eth0 address {mac}",
                f"addr add {address} dev eth0",
                f"route add default via {gateway}",
            ):
                subprocess.run(["ip", *command.split()], check=True)
            # passt believes the last frame's source, and those may have an earlier address.
            with contextlib.suppress(BlockingIOError):
                while os.read(self._tap.descriptors[0], 70000):
                    pass
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        os.close(self._end)
        self._thread.join(10)
        os.close(self._ended)
        self._tap.close()
        self.namespace.close()

    def _run(self) -> None:
        tap = self._tap.descriptors[0]
        buffered = b""
        while True:
            wanted: list[int | socket.socket] = [tap, self._stream, self._ended]
            ready = select.select(wanted, [], [])[0]
            if self._ended in ready:
                return
            with contextlib.suppress(BlockingIOError):
                if tap in ready:
                    frame = os.read(tap, 70000)[len(_HEADER) :]
                    self._stream.setblocking(True)
                    self._stream.sendall(struct.pack("!I", len(frame)) + frame)
                    self._stream.setblocking(False)
                if self._stream in ready:
                    part = self._stream.recv(1 << 16)
                    if not part:
                        return
                    buffered += part
            while len(buffered) >= 4 + (size := int.from_bytes(buffered[:4])):
                os.write(tap, _HEADER + buffered[4 : 4 + size])
                buffered = buffered[4 + size :]
