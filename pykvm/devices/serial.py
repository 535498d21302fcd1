"""A serial port of a PC (16550A), whose output goes to a file descriptor without Python.

Source: National Semiconductor, PC16550D data sheet, section 8; Linux drivers/tty/serial/8250.
"""

from __future__ import annotations

import os
from typing import Any, Final

from pykvm.closeable import ForkAware
from pykvm.devices._devices import ffi, lib
from pykvm.kvm import Handler, Handlers
from pykvm.sizes import KIB

__all__ = ["COM1_IRQ", "COM1_PORT", "Serial"]

COM1_PORT: Final = 0x3F8
COM1_IRQ: Final = 4

_TAIL: Final = 64 * KIB


class Serial(ForkAware):
    """A serial port.

    Attributes:
        interrupt: an eventfd that is written when the port raises its line; for `register_irqfd`.

    Args:
        output: descriptor to which the guest's output is written; None drops it. A guest waits
            while nobody takes what it writes.
    """

    def __init__(self, output: int | None = None) -> None:
        self.interrupt = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        raw: Any = lib.serial_new(-1 if output is None else output, self.interrupt)
        if raw == ffi.NULL:
            os.close(self.interrupt)
            raise MemoryError("no memory for a serial port")
        self._serial = ffi.gc(raw, lib.serial_free)

    def attach(self, handlers: Handlers, port: int = COM1_PORT) -> Handler:
        """Serve the eight ports from `port` on.

        Raises:
            HandlerOverlapError: another handler serves one of them.
            ForkedProcessError: the VM belongs to the parent process.
        """
        function = ffi.addressof(lib, "serial_access")
        return handlers.add_ports(port, lib.SERIAL_PORTS, function, self._serial)

    def stop(self) -> None:
        """Let no vCPU wait for a reader of the output any more; then stop the vCPUs."""
        lib.serial_stop(self._serial)

    def feed(self, data: bytes) -> int:
        """Send bytes to the guest; return how many of them it takes now.

        These are none before it asks for interrupts of received bytes, because a driver that starts
        throws away what it finds, and later as many as there is room for.

        Raises:
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("input for a serial port")
        return int(lib.serial_feed(self._serial, data, len(data)))

    def tail(self, size: int = _TAIL) -> bytes:
        """Return the last bytes that the guest has written, at most `size`, at most 64 KiB.

        Raises:
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("reading of a serial port")
        buffer = ffi.new("char[]", min(size, _TAIL))
        n: int = lib.serial_tail(self._serial, buffer, len(buffer))
        return bytes(ffi.buffer(buffer, n))

    def close(self) -> None:
        """Close the eventfd; remove the port's handler first."""
        descriptor, self.interrupt = self.interrupt, -1
        if descriptor >= 0:
            os.close(descriptor)
