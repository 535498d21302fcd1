"""A serial port of a PC (16550A), whose output goes to a file descriptor without Python.

Source: National Semiconductor, PC16550D data sheet, section 8; Linux drivers/tty/serial/8250.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from pykvm.closeable import ForkAware
from pykvm.devices._devices import ffi, lib
from pykvm.errors import PykvmError
from pykvm.kvm import Handler, Handlers
from pykvm.sizes import KIB

__all__ = ["COM1_IRQ", "COM1_PORT", "Serial", "SerialStateError"]

COM1_PORT: Final = 0x3F8
COM1_IRQ: Final = 4

_TAIL: Final = 64 * KIB


_REGISTERS: Final = ("ier", "fcr", "lcr", "mcr", "scr", "overrun", "sent", "divisor")


class SerialStateError(PykvmError, ValueError):
    """A state that no serial port has."""


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

    def watch(self, socket: int) -> bool:
        """Send what the guest writes to a socket too; return False if there are too many already.

        What a socket has no room for is not sent to it. Call `unwatch` before it is closed.

        Raises:
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("watching a serial port")
        return bool(lib.serial_watch(self._serial, socket) == 0)

    def unwatch(self, socket: int) -> None:
        """Undo `watch`. Harmless twice."""
        if not self.inherited:
            lib.serial_unwatch(self._serial, socket)

    def tail(self, size: int = _TAIL) -> bytes:
        """Return the last bytes that the guest has written, at most `size`, at most 64 KiB.

        Raises:
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("reading of a serial port")
        buffer = ffi.new("char[]", min(size, _TAIL))
        n: int = lib.serial_tail(self._serial, buffer, len(buffer))
        return bytes(ffi.buffer(buffer, n))

    def save(self) -> dict[str, Any]:
        """Return registers, and input that the guest has not read, as values for JSON.

        Call it while no vCPU runs and nobody feeds the port. The tail is not part of the state.

        Raises:
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("saving of a serial port")
        state = ffi.new("struct serial_state *")
        lib.serial_save(self._serial, state)
        registers = {name: int(getattr(state, name)) for name in _REGISTERS}
        return {**registers, "input": ffi.buffer(state.input, state.count)[:].hex()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `save` returned; raise the interrupt if there is something to tell.

        Call it while no vCPU runs, after KVM's interrupt controllers have been restored.

        Raises:
            SerialStateError: no port has such a state; this one stays as it was.
            ForkedProcessError: the port belongs to the parent process.
        """
        self.require_own("restoring of a serial port")
        raw = ffi.new("struct serial_state *")
        try:
            if state.keys() != {*_REGISTERS, "input"}:
                raise ValueError
            for name in _REGISTERS:
                setattr(raw, name, state[name])
            given = bytes.fromhex(state["input"])
            raw.count = len(given)
            raw.input[0 : len(given)] = given
            refused = lib.serial_restore(self._serial, raw)
        except (AttributeError, IndexError, OverflowError, TypeError, ValueError):
            refused = True
        if refused:
            raise SerialStateError(
                "no serial port has the state that is to be restored", "use another snapshot"
            )

    def close(self) -> None:
        """Close the eventfd; remove the port's handler first."""
        descriptor, self.interrupt = self.interrupt, -1
        if descriptor >= 0:
            os.close(descriptor)
