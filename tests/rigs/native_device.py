"""Accesses to a device in C, as the run loop makes them, without a guest."""

from typing import Any

from pykvm.kvm import Handler
from pykvm.kvm.native import ffi


class NativeDevice:
    """A device, by the handler that serves it.

    Args:
        handler: what the device's `attach` returned.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._function: Any = ffi.cast("pykvm_access_fn", handler.function)

    def write(self, offset: int, data: bytes | int, *, count: int = 1) -> bool:
        """Write bytes, or a number of one byte; return whether the device served it."""
        content = bytes([data]) if isinstance(data, int) else data
        buffer = ffi.new("uint8_t[]", content)
        return self._access(offset, buffer, len(content) // count, count, write=True)

    def read(self, offset: int, size: int = 1, *, count: int = 1) -> bytes:
        """Return what the device answers."""
        buffer = ffi.new("uint8_t[]", b"\xaa" * (size * count))
        assert self._access(offset, buffer, size, count, write=False)
        content: bytes = ffi.buffer(buffer, size * count)[:]
        return content

    def _access(self, offset: int, buffer: Any, size: int, count: int, *, write: bool) -> bool:
        access = ffi.new("struct pykvm_access *")
        access.offset, access.size, access.count = offset, size, count
        access.is_write, access.data = int(write), buffer
        served: int = self._function(ffi.cast("void *", self._handler.context), access)
        return bool(served)
