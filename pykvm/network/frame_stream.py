"""Frames over a stream socket, each with its length in front (32 bits, big endian).

passt speaks so, and ``-netdev stream`` of QEMU.

Source: QEMU net/stream.c.
"""

from __future__ import annotations

import socket

from pykvm.closeable import Closeable

__all__ = ["LARGEST_MTU", "FrameStream"]

LARGEST_MTU = 65520
"""Bytes; passt, too, takes no larger frames."""


class FrameStream(Closeable):
    """One end of a connection that carries frames. It owns the socket.

    Attributes:
        socket: the socket, which becomes non-blocking.
        mtu: bytes of payload in a frame.
    """

    def __init__(self, stream: socket.socket, mtu: int = 1500) -> None:
        self.socket = stream
        self.mtu = mtu
        stream.setblocking(False)

    def complaint(self, patience: float = 0) -> str:
        """Return why the other end has gone, as far as it is known; else an empty string.

        Args:
            patience: seconds to wait for the reason.
        """
        return ""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
