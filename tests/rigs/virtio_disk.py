"""The driver's side of a virtio block device, for native tests."""

from __future__ import annotations

import struct

from tests.rigs.virtio_driver import Request, VirtioDriver

__all__ = ["DISCARD", "FLUSH", "GET_ID", "IN", "IOERR", "OK", "OUT", "UNSUPP", "ZEROES"]
__all__ += ["DiskDriver"]

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


def header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


class DiskDriver(VirtioDriver):
    """Requests of a disk: those that wait return (status, data)."""

    def ask(
        self, kind: int, sector: int = 0, data: bytes = b"", size: int = 0
    ) -> tuple[int, bytes]:
        readable = [header(kind, sector)] + ([data] if data else [])
        done = self.request(0, readable, ([size] if size else []) + [1])
        assert done.written == size + 1
        return done.data[-1], done.data[:-1]

    def read(self, sector: int, size: int) -> bytes:
        status, data = self.ask(IN, sector, size=size)
        assert status == OK
        return data

    def write(self, sector: int, data: bytes) -> None:
        assert self.ask(OUT, sector, data)[0] == OK

    def flush(self) -> None:
        assert self.ask(FLUSH)[0] == OK

    def begin_write(self, sector: int, data: bytes) -> Request | None:
        """Make a write available, without a kick."""
        return self.submit(0, [header(OUT, sector), data], [1])

    def begin_flush(self) -> Request | None:
        return self.submit(0, [header(FLUSH, 0)], [1])
