"""Breakpoints and watchpoints of a debugger, and what makes a vCPU stop at them.

The processor has four debug registers. Watchpoints and hardware breakpoints need them; a software
breakpoint takes one that is left, and is an INT3 in the guest's memory only where none is. So the
guest's code stays as it is in most sessions, and breakpoints work where KVM cannot let INT3 stop a
guest (a KVM that interprets supervisor code).

Source: SDM vol. 3B, 18.2 (debug registers), 18.3.2 (breakpoint exceptions).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.address_space import AddressSpace
from pykvm.kvm import Breakpoint
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Arrangement", "Breakpoints", "Kind", "Point", "TooManyBreakpointsError"]

_INT3: Final = b"\xcc"
_DEBUG_REGISTERS: Final = 4
_MOST: Final = 1024
_SIZES: Final = (8, 4, 2, 1)


class TooManyBreakpointsError(PykvmError):
    """More breakpoints than the processor or the stub has."""


class Kind(Enum):
    """Kinds of points, with the numbers of the packets Z and z."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    ACCESS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """A breakpoint, or a watchpoint on `size` bytes.

    Raises:
        TooManyBreakpointsError: it needs more than four debug registers.
    """

    kind: Kind
    address: int
    size: int = 1

    def __post_init__(self) -> None:
        if self.kind in (Kind.WRITE, Kind.ACCESS) and not 1 <= self.size <= 32:
            raise TooManyBreakpointsError(
                f"a watchpoint of {self.size} bytes", "four debug registers watch 1 to 32 bytes"
            )

    def registers(self) -> list[Breakpoint]:
        """Return what the debug registers need for it: aligned parts of 8, 4, 2 or 1 bytes."""
        if self.kind in (Kind.SOFTWARE, Kind.HARDWARE):
            return [Breakpoint(self.address)]
        name = "write" if self.kind is Kind.WRITE else "access"
        parts, address, end = [], self.address, self.address + self.size
        while address < end:
            size = next(s for s in _SIZES if not address % s and address + s <= end)
            parts.append(Breakpoint(address, name, size))
            address += size
        return parts


@dataclass(frozen=True)
class Arrangement:
    """How the points are put into effect.

    Attributes:
        registers: contents of the debug registers.
        points: the point of each register.
        planted: GPA of each INT3 in memory, with the byte that was there.
    """

    registers: tuple[Breakpoint, ...] = ()
    points: tuple[Point, ...] = ()
    planted: dict[int, bytes] = field(default_factory=dict)


class Breakpoints:
    """The points of one debugger, for all vCPUs. The machine is paused whenever this is used."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._points: dict[Point, int | None] = {}  # with the GPA of a software breakpoint
        self.arranged = Arrangement()

    def insert(self, point: Point, space: AddressSpace) -> None:
        """Add a point; one that is there already is not added twice.

        Args:
            point: the point.
            space: where a software breakpoint's address is looked up.

        Raises:
            TooManyBreakpointsError: the debug registers do not suffice, or there are too many.
            NoMemoryError: a software breakpoint has no memory.
        """
        if point in self._points:
            return
        if len(self._points) >= _MOST:
            raise TooManyBreakpointsError(f"more than {_MOST} breakpoints", "remove some")
        physical = None
        if point.kind is Kind.SOFTWARE:
            physical, _ = space.memory_at(point.address)
        else:
            used = sum(len(p.registers()) for p in self._points if p.kind is not Kind.SOFTWARE)
            if used + len(point.registers()) > _DEBUG_REGISTERS:
                raise TooManyBreakpointsError(
                    f"no debug register is left for {point.address:#x}",
                    "remove a watchpoint or a hardware breakpoint",
                )
        self._points[point] = physical

    def remove(self, point: Point) -> None:
        """Remove a point; harmless if there is none."""
        self._points.pop(point, None)

    def clear(self) -> None:
        """Remove all points, and restore the guest's memory."""
        self._points.clear()
        self.take_out()

    # ---- putting them into effect -----------------------------------------------------------

    def arrange(self) -> Arrangement:
        """Share the debug registers out, write the other INT3s to memory, and return how."""
        self.take_out()
        hard = [point for point in self._points if point.kind is not Kind.SOFTWARE]
        registers = [(part, point) for point in hard for part in point.registers()]
        planted: dict[int, bytes] = {}
        for point, physical in self._points.items():
            if physical is None:
                continue
            if len(registers) < _DEBUG_REGISTERS:
                registers.append((point.registers()[0], point))
            elif physical not in planted:
                planted[physical] = self._memory.read(physical, 1)
        for physical in planted:
            self._memory.write(physical, _INT3)
        self.arranged = Arrangement(
            tuple(part for part, _ in registers), tuple(point for _, point in registers), planted
        )
        return self.arranged

    def take_out(self) -> None:
        """Restore the bytes under INT3s, unless the guest has written others meanwhile."""
        for physical, byte in self.arranged.planted.items():
            with suppress(PykvmError):  # the memory may have been removed
                if self._memory.read(physical, 1) == _INT3:
                    self._memory.write(physical, byte)
        self.arranged = Arrangement()
