"""Message-signalled interrupts of a PCI function (MSI-X), raised by eventfds.

A vector is an eventfd for whoever raises it. While the guest has unmasked it, KVM reads the eventfd
(irqfd) and sends the message. While it is masked nobody reads it, so that the eventfd itself is the
vector's pending bit.

Source: PCI Local Bus Specification 3.0, 6.8.2.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterable
from typing import Any, Final, Protocol

from pykvm.closeable import Closeable
from pykvm.devices.pci.function import PciFunction, PciStateError, saved_bytes
from pykvm.errors import PykvmError
from pykvm.kvm.errors import KvmError
from pykvm.kvm.interrupts import IrqchipRoute, MsiRoute

__all__ = ["MsiRoutes", "Msix", "VectorsExhaustedError"]

_CAPABILITY: Final = 0x11
_ENABLE: Final = 1 << 15
_MASK_ALL: Final = 1 << 14
_ENTRY: Final = 16
_MASKED: Final = 1
PBA_OFFSET: Final = 0x800
MAX_VECTORS: Final = PBA_OFFSET // _ENTRY


class VectorsExhaustedError(PykvmError):
    """More vectors than KVM routes."""


class _Vm(Protocol):
    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None: ...
    def register_irqfd(self, eventfd: int, gsi: int) -> None: ...
    def unregister_irqfd(self, eventfd: int, gsi: int) -> None: ...
    def require(self, name: str, what: str) -> int: ...


class MsiRoutes:
    """A VM's routes of GSIs to messages.

    Args:
        vm: the VM; it has interrupt controllers already.
        pins: the routes to their pins, which stay as they are.
    """

    def __init__(self, vm: _Vm, pins: Iterable[IrqchipRoute]) -> None:
        self.vm = vm
        self._pins = list(pins)
        self._next = 1 + max((route.gsi for route in self._pins), default=-1)
        self._messages: dict[int, MsiRoute] = {}
        self._most = vm.require("KVM_CAP_IRQ_ROUTING", "message-signalled interrupts")

    def allocate(self) -> int:
        """Return a GSI of its own for a vector.

        Raises:
            VectorsExhaustedError: KVM routes no more.
        """
        if self._next >= self._most:
            raise VectorsExhaustedError(
                f"more than {self._most} interrupt vectors", "use fewer devices or queues"
            )
        self._next += 1
        return self._next - 1

    def set(self, gsi: int, address: int, data: int) -> None:
        """Let a GSI send a message.

        Raises:
            KvmError: KVM refuses it; the routes stay as they were.
        """
        route = MsiRoute(gsi, address, data)
        if self._messages.get(gsi) != route:
            messages = {**self._messages, gsi: route}
            self.vm.set_gsi_routing([*self._pins, *messages.values()])
            self._messages = messages


class _Vector:
    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.live = False  # KVM reads the eventfd

    @property
    def pending(self) -> bool:
        return not self.live and bool(select.select([self.eventfd], [], [], 0)[0])


class Msix(Closeable):
    """The vectors of a function, with their table and pending bits in a BAR of 4 KiB.

    Args:
        function: the function; it gets the capability.
        bar: number of the BAR, whose reads and writes the function passes on to `read` and `write`.
        count: number of vectors, up to 128.
        routes: the VM's routes.

    Raises:
        VectorsExhaustedError: KVM routes no more.
    """

    def __init__(self, function: PciFunction, bar: int, count: int, routes: MsiRoutes) -> None:
        self._routes = routes
        self._function = function
        self._table = bytearray(struct.pack("<QII", 0, 0, _MASKED) * count)
        self._vectors: list[_Vector] = []
        try:
            for _ in range(count):
                self._vectors.append(_Vector(routes.allocate()))
        except PykvmError:
            self.close()
            raise
        body = struct.pack("<HII", count - 1, bar, PBA_OFFSET | bar)
        writable = struct.pack("<H", _ENABLE | _MASK_ALL)
        self._control = function.add_capability(_CAPABILITY, body, writable) + 2

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self._vectors)

    def eventfd(self, vector: int) -> int:
        """Return the eventfd that raises a vector; it stays the same for ever."""
        return self._vectors[vector].eventfd

    def raise_vector(self, vector: int) -> None:
        """Raise a vector."""
        os.eventfd_write(self._vectors[vector].eventfd, 1)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the BAR."""
        if offset >= PBA_OFFSET:
            bits = sum(vector.pending << n for n, vector in enumerate(self._vectors))
            area, at = bits.to_bytes(MAX_VECTORS // 8, "little"), offset - PBA_OFFSET
        else:
            area, at = bytes(self._table), offset
        return area[at : at + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Take a guest's write to the BAR; the pending bits cannot be written."""
        end = min(offset + len(data), len(self._table))
        if offset >= end:
            return
        self._table[offset:end] = data[: end - offset]
        for vector in range(offset // _ENTRY, (end - 1) // _ENTRY + 1):
            self._update(vector)

    def config_written(self) -> None:
        """Look at what the guest has written into the function's configuration space."""
        for vector in range(self.count):
            self._update(vector)

    def _update(self, number: int) -> None:
        """Let KVM read a vector's eventfd exactly while the vector is not masked."""
        vector = self._vectors[number]
        address, data, control = struct.unpack_from("<QII", self._table, number * _ENTRY)
        word = self._function.word(self._control)
        wanted = bool(word & _ENABLE) and not (word & _MASK_ALL or control & _MASKED)
        if wanted:
            try:
                self._routes.set(vector.gsi, address, data)
            except KvmError:
                wanted = False  # an address that no interrupt controller has: nothing arrives
        if wanted != vector.live:
            vm = self._routes.vm
            change = vm.register_irqfd if wanted else vm.unregister_irqfd
            change(vector.eventfd, vector.gsi)
            vector.live = wanted

    def save(self) -> dict[str, Any]:
        """Return the table, and which vectors are pending, as values for JSON."""
        pending = [number for number, vector in enumerate(self._vectors) if vector.pending]
        return {"table": self._table.hex(), "pending": pending}

    def restore(self, state: Any) -> None:
        """Set what `save` returned, after the function's configuration space.

        Raises:
            PciStateError: it is of a function with another number of vectors.
        """
        table = saved_bytes(state, "table", len(self._table))
        pending = state.get("pending")
        if not isinstance(pending, list) or not all(
            type(one) is int and 0 <= one < self.count for one in pending
        ):
            raise PciStateError("pending")
        self._table[:] = table
        self.config_written()
        for number in pending:
            self.raise_vector(number)

    def close(self) -> None:
        """Close the eventfds. Harmless twice."""
        vectors, self._vectors = self._vectors, []
        for vector in vectors:
            if vector.live and not self.inherited:
                self._routes.vm.unregister_irqfd(vector.eventfd, vector.gsi)
            os.close(vector.eventfd)
