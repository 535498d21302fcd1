"""Interrupts and timers of a VM: irqchip, GSI routing, irqfd, ioeventfd, MSI, PIT, clock.

A GSI is a global system interrupt: the number that routing maps to pins of the in-kernel PIC and
IOAPIC or to a message (MSI).

Source: Documentation/virt/kvm/api.rst 4.24 to 4.30, 4.52, 4.59, 4.71, 4.75.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.handle import Handle, Struct

__all__ = ["IrqchipRoute", "MsiRoute", "VmInterrupts"]

Eventfd = Any
"""A descriptor number, or an object with fileno()."""


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """A GSI that raises a pin. chip: ``lib.KVM_IRQCHIP_*`` (PIC master, PIC slave, IOAPIC)."""

    gsi: int
    chip: int
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that sends a message. address: 64 bits, data: 32 (SDM vol. 3A 11.11)."""

    gsi: int
    address: int
    data: int


def _fd(eventfd: Eventfd) -> int:
    return eventfd if isinstance(eventfd, int) else int(eventfd.fileno())


class VmInterrupts(Handle):
    """The part of `Vm` that has to do with interrupts and time."""

    # ---- irqchip ----------------------------------------------------------------------------
    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC per vCPU in the kernel; before the first vCPU."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def split_irqchip(self, ioapic_pins: int = 24) -> None:
        """Local APICs in the kernel, PIC and IOAPIC left to user space (`IoapicEoi` exits)."""
        self.require("KVM_CAP_SPLIT_IRQCHIP", "split_irqchip()")
        request = ffi.new("struct kvm_enable_cap *", {"cap": lib.KVM_CAP_SPLIT_IRQCHIP})
        request.args[0] = ioapic_pins
        self.ioctl("KVM_ENABLE_CAP", request)

    def get_irqchip(self, chip: int) -> bytes:
        """State of one chip, 512 bytes (struct kvm_pic_state or kvm_ioapic_state)."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        self.ioctl("KVM_GET_IRQCHIP", state)
        return ffi.buffer(state.chip.dummy)[:]

    def set_irqchip(self, chip: int, state: bytes) -> None:
        request = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        ffi.buffer(request.chip.dummy)[0 : len(state)] = state
        self.ioctl("KVM_SET_IRQCHIP", request)

    def irq_line(self, gsi: int, level: bool) -> int:
        """Set a line; 1 or more: delivered to as many vCPUs, 0: coalesced, -1: masked."""
        request = ffi.new("struct kvm_irq_level *")
        request.irq = gsi
        request.level = int(level)
        if not self.check_extension("KVM_CAP_IRQ_INJECT_STATUS"):
            self.ioctl("KVM_IRQ_LINE", request)
            return 1
        self.ioctl("KVM_IRQ_LINE_STATUS", request)
        return int(request.status)

    def signal_msi(self, address: int, data: int) -> int:
        """Send a message; more than 0: delivered, 0: the guest blocked it."""
        request = ffi.new("struct kvm_msi *")
        request.address_lo = address & 0xFFFFFFFF
        request.address_hi = address >> 32
        request.data = data
        return self.ioctl("KVM_SIGNAL_MSI", request)

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        """Replace the whole routing table. Raises IoctlError for an impossible route."""
        routes = list(routes)
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(routes), "entries": len(routes)})
        for slot, route in enumerate(routes):
            _fill_route(table.entries[slot], route)
        self.ioctl("KVM_SET_GSI_ROUTING", table)

    # ---- eventfds ---------------------------------------------------------------------------
    def irqfd(self, eventfd: Eventfd, gsi: int, *, resample: Eventfd | None = None) -> None:
        """Raise a GSI at every write to an eventfd, without user space.

        resample: for a level-triggered line, an eventfd that KVM signals at the guest's EOI.
        """
        request = ffi.new("struct kvm_irqfd *", {"fd": _fd(eventfd), "gsi": gsi})
        if resample is not None:
            self.require("KVM_CAP_IRQFD_RESAMPLE", "irqfd(resample=...)")
            request.flags = lib.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = _fd(resample)
        self.ioctl("KVM_IRQFD", request)

    def remove_irqfd(self, eventfd: Eventfd, gsi: int) -> None:
        request = ffi.new("struct kvm_irqfd *", {"fd": _fd(eventfd), "gsi": gsi})
        request.flags = lib.KVM_IRQFD_FLAG_DEASSIGN
        self.ioctl("KVM_IRQFD", request)

    def ioeventfd(
        self,
        eventfd: Eventfd,
        address: int,
        size: int,
        *,
        port: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Signal an eventfd at a guest's write, without an exit to user space.

        address: GPA, or port number where port is True. size: 1, 2, 4 or 8 bytes, 0 for any.
        datamatch: only writes of this value. Raises IoctlError (EEXIST: there is one already).
        """
        self.ioctl(
            "KVM_IOEVENTFD", _ioeventfd(eventfd, address, size, port=port, datamatch=datamatch)
        )

    def remove_ioeventfd(
        self,
        eventfd: Eventfd,
        address: int,
        size: int,
        *,
        port: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Undo `ioeventfd` with the same arguments."""
        request = _ioeventfd(eventfd, address, size, port=port, datamatch=datamatch)
        request.flags |= 1 << lib.kvm_ioeventfd_flag_nr_deassign
        self.ioctl("KVM_IOEVENTFD", request)

    # ---- PIT and clock ----------------------------------------------------------------------
    def create_pit(self, *, speaker_dummy: bool = True) -> None:
        """An i8254 in the kernel, after create_irqchip(). speaker_dummy: port 0x61 as well."""
        flags = lib.KVM_PIT_SPEAKER_DUMMY if speaker_dummy else 0
        self.ioctl("KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": flags}))

    def get_pit(self) -> Struct:
        """struct kvm_pit_state2."""
        return self._get("KVM_GET_PIT2", "kvm_pit_state2")

    def set_pit(self, state: Struct) -> None:
        self.ioctl("KVM_SET_PIT2", state)

    def set_pit_reinject(self, reinject: bool) -> None:
        """Whether timer ticks that the guest missed are delivered late."""
        request = ffi.new("struct kvm_reinject_control *", {"pit_reinject": int(reinject)})
        self.ioctl("KVM_REINJECT_CONTROL", request)

    def get_clock(self) -> Struct:
        """struct kvm_clock_data: the guest's kvmclock in ns, flags ``lib.KVM_CLOCK_*``."""
        return self._get("KVM_GET_CLOCK", "kvm_clock_data")

    def set_clock(self, nanoseconds: int) -> None:
        self.ioctl("KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", {"clock": nanoseconds}))

    def tsc_khz(self) -> int:
        """Frequency of the TSC that new vCPUs get, kHz."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        self.ioctl("KVM_SET_TSC_KHZ", khz)


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
