"""A virtio console: a terminal, and further streams of bytes with an end of file.

Port 0 is the console proper (hvc0 in Linux). Further ports are files in the guest, named in
/sys/class/virtio-ports, for streams that are to be separate. The end of a port's input is told to
the guest, which reads what was sent before and then an end of file; that the guest has closed a
port, after its last byte is out, is told to `Console.on_port`.

Source: VIRTIO 1.2, 5.3; Linux drivers/char/virtio_console.c.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Final

from pykvm.devices.virtio._virtio import ffi, lib
from pykvm.devices.virtio.device import DeviceStateError, DeviceType
from pykvm.devices.virtio.loop import NATIVE_FEATURES, DataPlaneError, NativeDevice
from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Console", "Port", "PortNameError", "PortState"]

_F_SIZE: Final = 1 << 0
_F_MULTIPORT: Final = 1 << 1
_QUEUE_SIZE: Final = 32
_MOST_PORTS: Final = 31


class PortNameError(PykvmError, ValueError):
    """A name of a port that is too long, or too many ports."""


class PortState(IntFlag):
    """State of a port.

    OPENED: the guest has it open. CLOSED: it had, and all that it has written is out. ENDED: the
    input has ended, and the guest has been told. NO_READER: nobody takes the output any more, which
    is dropped.
    """

    OPENED = lib.CONSOLE_OPENED
    CLOSED = lib.CONSOLE_CLOSED
    ENDED = lib.CONSOLE_ENDED
    NO_READER = lib.CONSOLE_NO_READER


_STATES: Final = int(PortState.OPENED | PortState.CLOSED | PortState.ENDED | PortState.NO_READER)


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a console.

    The descriptors stay the caller's, who may close them when the console is made.

    Attributes:
        name: in the guest; "" for none.
        input: descriptor of what the guest reads; None: nothing ever comes.
        output: descriptor of what the guest writes; None drops it.
        is_console: whether the guest makes a terminal of it; port 0 always is one.
    """

    name: str = ""
    input: int | None = None
    output: int | None = None
    is_console: bool = False


class Console(NativeDevice):
    """A console and further ports.

    Attributes:
        on_port: called in a thread of its own with a port's number and state when that changes.

    Args:
        ports: the first is the console; at most 31.
        size: columns and rows of its terminal, where there is one.

    Raises:
        PortNameError: a name has more than 31 bytes, or there are too many ports.
        DataPlaneError: the host has no descriptors for them.
    """

    type = DeviceType.CONSOLE
    on_port: Callable[[int, PortState], None]

    def __init__(
        self, memory: GuestMemory, ports: Sequence[Port], size: tuple[int, int] | None = None
    ) -> None:
        if not 1 <= len(ports) <= _MOST_PORTS:
            raise PortNameError(f"a console with {len(ports)} ports", f"use 1 to {_MOST_PORTS}")
        raw = ffi.new("struct console_port[]", len(ports))
        ours: list[int] = []
        try:
            for number, (to, port) in enumerate(zip(raw, ports, strict=True)):
                name = port.name.encode()
                if len(name) >= lib.CONSOLE_NAME_BYTES or b"\0" in name:
                    raise PortNameError(
                        f"{port.name!r} as the name of a port",
                        f"use at most {lib.CONSOLE_NAME_BYTES - 1} bytes",
                    )
                to.name = name
                to.is_console = port.is_console or number == 0
                to.input = _unblocked(port.input, os.O_RDONLY, ours)
                to.output = _unblocked(port.output, os.O_WRONLY, ours)
            device = lib.console_new(raw, len(ports))
            if device == ffi.NULL:
                raise DataPlaneError(
                    f"no descriptors for a console: {os.strerror(ffi.errno)}",
                    "raise the limit of open files (ulimit -n)",
                )
        finally:
            for descriptor in ours:
                os.close(descriptor)
        self.ports = tuple(ports)
        self.queue_sizes = (_QUEUE_SIZE,) * (2 * len(ports) + 2)
        self.features = NATIVE_FEATURES | _F_MULTIPORT | (_F_SIZE if size else 0)
        self.on_port = lambda number, state: None
        self._size = size or (0, 0)
        self._seen = [PortState(0)] * len(ports)
        super().__init__(memory, "console", device, lib.console_free)
        lib.console_resize(device, *self._size)

    def config(self) -> bytes:
        return struct.pack("<HHII", *self._size, len(self.ports), 0)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the new size of the terminal; no effect where it had none."""
        if not self.features & _F_SIZE:
            return
        self._size = (columns & 0xFFFF, rows & 0xFFFF)
        with self._lock:
            if self._device is None:
                return
            lib.console_resize(self._device, *self._size)
        self._nudge()
        self.on_config()

    def state(self, port: int) -> PortState:
        """Return what is known of a port; of a closed console, nothing."""
        with self._lock:
            if self._device is None:
                return PortState(0)
            return PortState(lib.console_state(self._device, port))

    def save(self) -> dict[str, Any]:
        """Return the states of the ports.

        What the guest has not been told yet of an end of input or of a size is not part of them.
        """
        return {"ports": [int(self.state(number)) for number in range(len(self.ports))]}

    def restore(self, state: Any) -> None:
        """Set what the guest has open.

        Raises:
            DeviceStateError: the saved console had other ports.
        """
        ports = state.get("ports") if isinstance(state, dict) else None
        if (
            not isinstance(ports, list)
            or len(ports) != len(self.ports)
            or not all(type(port) is int and 0 <= port <= _STATES for port in ports)
        ):
            raise DeviceStateError(
                f"the saved state is not that of a console with {len(self.ports)} ports",
                "give the machine the devices that it had",
            )
        for number, port in enumerate(ports):
            self.set_state(number, PortState(port))

    def set_state(self, port: int, state: PortState) -> None:
        """Say before the start what a guest from a snapshot has open (`state` has told it)."""
        with self._lock:
            if self._device is not None and self._loop is None:
                lib.console_set_state(self._device, port, state)

    def flush(self, seconds: float) -> int:
        """Write what the guest had written before the device was stopped.

        Returns:
            The bytes that nobody has taken in that time; 0 while the device runs.
        """
        end = time.monotonic() + seconds
        left = 0
        with self._lock:
            for number in range(len(self.ports)):
                if self._device is not None and self._loop is None:
                    wait = max(0, int((end - time.monotonic()) * 1000))
                    left += lib.console_flush(self._device, number, wait)
        return left

    def _noticed(self) -> None:
        for number, before in enumerate(self._seen):
            state = self.state(number)
            if state != before:
                self._seen[number] = state
                self.on_port(number, state)


def _unblocked(descriptor: int | None, flags: int, ours: list[int]) -> int:
    """Return a descriptor of the same pipe or terminal that does not block, where one can be had.

    O_NONBLOCK belongs to what is shared with the user's shell, so it is not set there: the file is
    opened again. A regular file is left alone, because its position is shared too.
    """
    if descriptor is None:
        return -1
    mode = os.fstat(descriptor).st_mode
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK or not (
        stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    ):
        return descriptor
    try:
        opened = os.open(
            f"/proc/self/fd/{descriptor}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        )
    except OSError:  # another user's terminal: console_output.c waits before it writes
        return descriptor
    ours.append(opened)
    return opened
