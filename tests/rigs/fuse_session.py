"""A FUSE client over a virtio driver: what a guest's kernel asks a virtiofsd.

Source: Linux include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import count

from tests.rigs.virtio_driver import VirtioDriver

__all__ = ["Entry", "FuseSession"]

LOOKUP, OPEN, READ, WRITE, MKDIR, INIT = 1, 14, 15, 16, 9, 26
ROOT = 1
REQUESTS = 1
"""The queue of requests; queue 0 has those of high priority."""


@dataclass(frozen=True)
class Entry:
    """A file that was looked up."""

    node: int
    size: int
    mode: int
    uid: int


class FuseSession:
    """A session; its construction makes FUSE_INIT."""

    def __init__(self, driver: VirtioDriver) -> None:
        self._driver = driver
        self._unique = count(1)
        reply = self.call(INIT, 0, struct.pack("=IIII", 7, 31, 1 << 20, 0), 64)
        self.version = struct.unpack_from("=II", reply)

    def call(self, opcode: int, node: int, arguments: bytes, size: int) -> bytes:
        """Make a request; return the reply's body, of at most `size` bytes.

        Raises:
            OSError: the server's errno.
        """
        unique = next(self._unique)
        header = struct.pack("=IIQQIIIHH", 40 + len(arguments), opcode, unique, node, 0, 0, 1, 0, 0)
        done = self._driver.request(REQUESTS, [header, arguments], [16, size] if size else [16])
        length, error, about = struct.unpack_from("=IiQ", done.data)
        assert about == unique
        assert length == done.written
        if error:
            raise OSError(-error, os.strerror(-error))
        return done.data[16:]

    def lookup(self, path: str) -> Entry:
        """Look a path up from the root on."""
        entry = Entry(ROOT, 0, 0, 0)
        for name in path.strip("/").split("/"):
            data = self.call(LOOKUP, entry.node, name.encode() + b"\0", 128)
            node, size = struct.unpack_from("=Q40xQ", data)
            mode, _, uid = struct.unpack_from("=III", data, 100)
            entry = Entry(node, size, mode, uid)
        return entry

    def open(self, path: str, flags: int = os.O_RDONLY) -> tuple[int, int]:
        """Open a file; return its node and its handle."""
        node = self.lookup(path).node
        data = self.call(OPEN, node, struct.pack("=II", flags, 0), 16)
        return node, struct.unpack_from("=Q", data)[0]

    def read(self, path: str, size: int = 4096, offset: int = 0) -> bytes:
        """Read a part of a file."""
        node, handle = self.open(path)
        return self.call(
            READ, node, struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0), size
        )

    def write(self, path: str, data: bytes) -> None:
        """Write to the beginning of a file that exists."""
        node, handle = self.open(path, os.O_WRONLY)
        head = struct.pack("=QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        self.call(WRITE, node, head + data, 8)

    def mkdir(self, parent: str, name: str) -> None:
        node = self.lookup(parent).node if parent else ROOT
        self.call(MKDIR, node, struct.pack("=II", 0o755, 0) + name.encode() + b"\0", 128)
