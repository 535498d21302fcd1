"""Interrupts of a VM on any architecture: lines, GSI routing, MSIs, irqfds and ioeventfds.

A GSI is a global system interrupt: the number that routing maps to pins of the in-kernel
interrupt controllers or to a message (MSI).

Source: Documentation/virt/kvm/api.rst 4.25, 4.52, 4.59, 4.71, 4.75.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pykvm.kvm.errors import GsiRoutingError
from pykvm.kvm.handle import Handle
from pykvm.kvm.native import Struct, ffi, lib

__all__ = ["Interrupts", "IrqchipRoute", "MsiRoute"]

Eventfd = Any
"""A descriptor number, or an object with fileno()."""


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """A GSI that raises a pin.

    Attributes:
        gsi: the global system interrupt.
        chip: ``lib.KVM_IRQCHIP_*`` (PIC master, PIC slave, IOAPIC).
        pin: a pin of the chip.
    """

    gsi: int
    chip: int
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that sends a message (SDM vol. 3A 11.11).

    Attributes:
        gsi: the global system interrupt.
        address: 64 bits.
        data: 32 bits.
    """

    gsi: int
    address: int
    data: int


class Interrupts(Handle):
    """The part of `Vm` that delivers interrupts."""

    def set_irq_line(self, gsi: int, level: bool) -> int:
        """Set the level of a line.

        Returns:
            The number of vCPUs that it was delivered to; 0 if it was coalesced, -1 if masked.
        """
        request = ffi.new("struct kvm_irq_level *")
        request.irq = gsi
        request.level = int(level)
        if not self.check_extension("KVM_CAP_IRQ_INJECT_STATUS"):
            self.ioctl("KVM_IRQ_LINE", request)
            return 1
        self.ioctl("KVM_IRQ_LINE_STATUS", request)
        return int(request.status)

    def signal_msi(self, address: int, data: int) -> int:
        """Send a message.

        Returns:
            More than 0 if it was delivered, 0 if the guest blocked it.
        """
        request = ffi.new("struct kvm_msi *")
        request.address_lo = address & 0xFFFFFFFF
        request.address_hi = address >> 32
        request.data = data
        return self.ioctl("KVM_SIGNAL_MSI", request)

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        """Replace the whole routing table.

        Raises:
            GsiRoutingError: there are more routes, or a higher GSI, than this KVM takes.
            IoctlError: a route is impossible.
        """
        routes = list(routes)
        limit = self.require("KVM_CAP_IRQ_ROUTING", "set_gsi_routing()")
        if len(routes) > limit:
            raise GsiRoutingError(f"{len(routes)} gsi routes", f"pass at most {limit}")
        for route in routes:
            if not 0 <= route.gsi < limit:
                raise GsiRoutingError(f"a route for gsi {route.gsi}", f"use 0 to {limit - 1}")
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(routes), "entries": len(routes)})
        for slot, route in enumerate(routes):
            _fill_route(table.entries[slot], route)
        self.ioctl("KVM_SET_GSI_ROUTING", table)

    # ---- eventfds ---------------------------------------------------------------------------
    def register_irqfd(
        self, eventfd: Eventfd, gsi: int, *, resample: Eventfd | None = None
    ) -> None:
        """Raise a GSI at every write to an eventfd, without user space.

        Args:
            eventfd: a descriptor, or an object with one.
            gsi: the interrupt to raise.
            resample: for a level-triggered line, an eventfd that KVM signals at the guest's EOI.
        """
        request = ffi.new("struct kvm_irqfd *", {"fd": _fd(eventfd), "gsi": gsi})
        if resample is not None:
            self.require("KVM_CAP_IRQFD_RESAMPLE", "register_irqfd(resample=...)")
            request.flags = lib.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = _fd(resample)
        self.ioctl("KVM_IRQFD", request)

    def unregister_irqfd(self, eventfd: Eventfd, gsi: int) -> None:
        """Undo `register_irqfd`; harmless where there is none."""
        request = ffi.new("struct kvm_irqfd *", {"fd": _fd(eventfd), "gsi": gsi})
        request.flags = lib.KVM_IRQFD_FLAG_DEASSIGN
        self.ioctl("KVM_IRQFD", request)

    def register_ioevent(
        self,
        eventfd: Eventfd,
        address: int,
        size: int,
        *,
        port: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Signal an eventfd at a guest's write, without an exit to user space.

        Args:
            eventfd: a descriptor, or an object with one.
            address: a GPA, or a port number where `port` is True.
            size: 1, 2, 4 or 8 bytes; 0 for a write of any size.
            port: whether it is a port.
            datamatch: the only value that counts, if given.

        Raises:
            IoctlError: an argument is wrong, or there is an eventfd already (EEXIST).
        """
        request = _ioeventfd(eventfd, address, size, port=port, datamatch=datamatch)
        self.ioctl("KVM_IOEVENTFD", request)

    def unregister_ioevent(
        self,
        eventfd: Eventfd,
        address: int,
        size: int,
        *,
        port: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Undo `register_ioevent`, with the same arguments."""
        request = _ioeventfd(eventfd, address, size, port=port, datamatch=datamatch)
        request.flags |= 1 << lib.kvm_ioeventfd_flag_nr_deassign
        self.ioctl("KVM_IOEVENTFD", request)


def _fd(eventfd: Eventfd) -> int:
    return eventfd if isinstance(eventfd, int) else int(eventfd.fileno())


def _fill_route(entry: Struct, route: IrqchipRoute | MsiRoute) -> None:
    entry.gsi = route.gsi
    if isinstance(route, IrqchipRoute):
        entry.type = lib.KVM_IRQ_ROUTING_IRQCHIP
        chip = ffi.cast("struct kvm_irq_routing_irqchip *", entry.u.pad)
        chip.irqchip = route.chip
        chip.pin = route.pin
    else:
        entry.type = lib.KVM_IRQ_ROUTING_MSI
        msi = ffi.cast("struct kvm_irq_routing_msi *", entry.u.pad)
        msi.address_lo = route.address & 0xFFFFFFFF
        msi.address_hi = route.address >> 32
        msi.data = route.data


def _ioeventfd(
    eventfd: Eventfd, address: int, size: int, *, port: bool, datamatch: int | None
) -> Struct:
    request = ffi.new("struct kvm_ioeventfd *", {"addr": address, "len": size})
    request.fd = _fd(eventfd)
    if port:
        request.flags |= 1 << lib.kvm_ioeventfd_flag_nr_pio
    if datamatch is not None:
        request.flags |= 1 << lib.kvm_ioeventfd_flag_nr_datamatch
        request.datamatch = datamatch
    return request
