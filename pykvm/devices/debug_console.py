"""A debug console: ports whose output is collected, as Bochs and QEMU do with port 0xE9.

Output never reaches Python until `DebugConsole.read` takes it.
"""

from __future__ import annotations

from typing import Any, Final

from pykvm.closeable import ForkAware
from pykvm.devices._devices import ffi, lib
from pykvm.errors import PykvmError
from pykvm.kvm import Handler, Handlers
from pykvm.sizes import KIB, PAGE_SIZE

__all__ = ["DEBUG_PORT", "ConsoleSizeError", "DebugConsole"]

DEBUG_PORT: Final = 0xE9


class ConsoleSizeError(PykvmError, ValueError):
    """A console with an empty buffer."""


class DebugConsole(ForkAware):
    """Collector of the output that guests write to its ports.

    Args:
        size: bytes of the buffer; output that does not fit is dropped and counted.

    Raises:
        ConsoleSizeError: the buffer would be empty.
    """

    def __init__(self, size: int = 64 * KIB) -> None:
        if size < 1:
            raise ConsoleSizeError(f"a console buffer of {size} bytes", "use 1 or more")
        raw: Any = lib.debug_console_new(size)
        if raw == ffi.NULL:
            raise MemoryError(f"no memory for a console of {size} bytes")
        self._console = ffi.gc(raw, lib.debug_console_free)

    def attach(self, handlers: Handlers, port: int = DEBUG_PORT) -> Handler:
        """Collect the output to a port of a VM. A console may serve several ports and VMs.

        Args:
            handlers: handlers of the VM.
            port: I/O port.

        Returns:
            The handler, for `Handlers.remove`.

        Raises:
            HandlerOverlapError: another handler serves the port.
            ForkedProcessError: the VM belongs to the parent process.
        """
        function = ffi.addressof(lib, "debug_console_access")
        return handlers.add_ports(port, 1, function, self._console)

    def read(self) -> bytes:
        """Return the collected output and empty the buffer. Any thread may call it, at any time.

        Raises:
            ForkedProcessError: the buffer is the parent process's, and its lock may be held.
        """
        self.require_own("reading of a debug console")
        chunk = ffi.new("char[]", PAGE_SIZE)
        result = b""
        while n := lib.debug_console_read(self._console, chunk, PAGE_SIZE):
            result += ffi.buffer(chunk, n)[:]
        return result

    @property
    def dropped(self) -> int:
        """Number of bytes that were dropped because the buffer was full.

        Raises:
            ForkedProcessError: the buffer belongs to the parent process.
        """
        self.require_own("reading of a debug console")
        return int(lib.debug_console_dropped(self._console))
