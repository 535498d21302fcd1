"""A PCI function: its configuration space, and the memory behind its base address registers.

Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 4.0, chapter 7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from pykvm.errors import PykvmError

__all__ = ["CONFIG_SIZE", "Bar", "PciFunction", "PciStateError", "saved_bytes"]

CONFIG_SIZE: Final = 4096
"""Bytes of a function's configuration space, by ECAM."""

_CONVENTIONAL: Final = 256  # the rest holds extended capabilities, of which there are none

_COMMAND: Final = 0x04
_STATUS: Final = 0x06
_BARS: Final = 0x10
_CAPABILITIES: Final = 0x34
_FIRST_CAPABILITY: Final = 0x40

_MEMORY_ENABLE: Final = 1 << 1
_BUS_MASTER: Final = 1 << 2
_INTERRUPT_DISABLE: Final = 1 << 10
_HAS_CAPABILITIES: Final = 1 << 4


class PciStateError(PykvmError, ValueError):
    """A saved state that is not this function's."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the saved state is of another pci function: {what}",
            "give the machine the devices that it had",
        )


def saved_bytes(state: Any, name: str, size: int) -> bytes:
    """Return an entry of a saved state: bytes, as hexadecimal digits.

    Raises:
        PciStateError: there is none of this size.
    """
    try:
        found = bytes.fromhex(state[name])
    except (KeyError, TypeError, ValueError) as error:
        raise PciStateError(name) from error
    if len(found) != size:
        raise PciStateError(name)
    return found


@dataclass(slots=True)
class Bar:
    """A range of memory of a function.

    Attributes:
        index: number of the base address register.
        size: bytes, a power of 2, at least 16.
        gpa: where the function answers now; None while it does not.
    """

    index: int
    size: int
    gpa: int | None = None


class PciFunction:
    """A function without interrupt pins and I/O ports. Subclasses say what its memory does.

    All values that reach it come from the guest. Its bus calls it from one thread at a time.

    Args:
        ids: vendor, device, subsystem vendor, subsystem.
        class_code: base class, subclass and programming interface, 24 bits.
        revision: a byte.
    """

    def __init__(
        self, ids: tuple[int, int, int, int], class_code: int, *, revision: int = 1
    ) -> None:
        self.bars: list[Bar] = []
        self._config = bytearray(_CONVENTIONAL)
        self._writable = bytearray(_CONVENTIONAL)
        self._next_capability = _FIRST_CAPABILITY
        self._last_link = _CAPABILITIES
        vendor, device, subsystem_vendor, subsystem = ids
        struct.pack_into("<HH", self._config, 0, vendor, device)
        struct.pack_into("<I", self._config, 0x08, class_code << 8 | revision)
        struct.pack_into("<HH", self._config, 0x2C, subsystem_vendor, subsystem)
        command = _MEMORY_ENABLE | _BUS_MASTER | _INTERRUPT_DISABLE
        struct.pack_into("<H", self._writable, _COMMAND, command)
        self._writable[0x0C] = 0xFF  # cache line size and interrupt line: scratch registers
        self._writable[0x3C] = 0xFF

    # ---- construction -----------------------------------------------------------------------

    def add_bar(self, size: int) -> Bar:
        """Add 32-bit memory that is not prefetchable, in the next register."""
        bar = Bar(len(self.bars), size)
        self.bars.append(bar)
        struct.pack_into("<I", self._writable, _BARS + 4 * bar.index, -size & 0xFFFF_FFFF)
        return bar

    def place_bar(self, bar: Bar, gpa: int) -> None:
        """Write an address into a register, as firmware does; decoding stays off."""
        struct.pack_into("<I", self._config, _BARS + 4 * bar.index, gpa)

    def add_capability(self, number: int, body: bytes, writable: bytes = b"") -> int:
        """Add a capability.

        Args:
            number: its type (6.7).
            body: what follows its number and link.
            writable: the bits of the body that the guest may write; none by default.

        Returns:
            Its place in the configuration space.
        """
        at = self._next_capability
        self._config[at : at + 2 + len(body)] = bytes([number, 0]) + body
        self._writable[at + 2 : at + 2 + len(writable)] = writable
        self._config[self._last_link] = at
        self._config[_STATUS] |= _HAS_CAPABILITIES
        self._last_link = at + 1
        self._next_capability = (at + 2 + len(body) + 3) & ~3
        return at

    # ---- the guest's accesses ---------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> bytes:
        """Return bytes of the configuration space; zeros where nothing is."""
        return bytes(self._config[offset : offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a guest's write to the configuration space."""
        end = min(offset + len(data), _CONVENTIONAL)
        for at, value in zip(range(offset, end), data, strict=False):
            mask = self._writable[at]
            self._config[at] = self._config[at] & ~mask | value & mask
        if offset < _COMMAND + 2 or (offset < 0x28 and end > _BARS):
            self._decode()

    def read_bar(self, bar: Bar, offset: int, size: int) -> bytes:
        """Return `size` bytes of a BAR's memory: zeros, unless a subclass has something there."""
        return bytes(size)

    def write_bar(self, bar: Bar, offset: int, data: bytes) -> None:
        """Take a guest's write to a BAR's memory: nothing, unless a subclass says so."""

    def bar_moved(self, bar: Bar) -> None:
        """Learn that `bar.gpa` has changed."""

    # ---- snapshots, while no vCPU runs --------------------------------------------------------

    def pause(self) -> None:
        """Let nobody access guest memory for the function, until `resume` or the end."""

    def resume(self) -> None:
        """Undo `pause`."""

    def save(self) -> dict[str, Any]:
        """Return the state of a paused function, as values for JSON."""
        return {"config": self._config.hex()}

    def restore(self, state: Any) -> None:
        """Set the state of a new function; pause and resume are not needed.

        Raises:
            PciStateError: it is of a function with other registers.
        """
        config = saved_bytes(state, "config", len(self._config))
        places = zip(config, self._config, self._writable, strict=True)
        if any((new ^ old) & ~mask for new, old, mask in places):
            raise PciStateError("config")
        self._config[:] = config
        self._decode()

    # ---- decoding ---------------------------------------------------------------------------

    def word(self, offset: int) -> int:
        """Return a 16-bit register of the configuration space."""
        return int.from_bytes(self._config[offset : offset + 2], "little")

    @property
    def masters(self) -> bool:
        """True if the guest lets the function access memory and send interrupts."""
        return bool(self.word(_COMMAND) & _BUS_MASTER)

    def _decode(self) -> None:
        enabled = self.word(_COMMAND) & _MEMORY_ENABLE
        for bar in self.bars:
            at = _BARS + 4 * bar.index
            register = int.from_bytes(self._config[at : at + 4], "little")
            gpa = register & -bar.size if enabled else None
            if gpa != bar.gpa:
                bar.gpa = gpa
                self.bar_moved(bar)
