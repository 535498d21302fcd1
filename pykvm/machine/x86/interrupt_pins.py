"""Routes of GSIs to the pins of KVM's interrupt controllers, as KVM sets them up itself.

They have to be given anew with every message-signalled interrupt, because KVM takes its table of
routes as a whole. Source: Linux arch/x86/kvm/irq_comm.c (default_routing).
"""

from typing import Final

from pykvm.kvm import IrqchipRoute
from pykvm.kvm.native import lib

__all__ = ["IO_APIC_PINS", "default_routes"]

IO_APIC_PINS: Final = 24
_PIC_PINS: Final = 8


def default_routes() -> list[IrqchipRoute]:
    """Return the routes of GSIs 0 to 23: to the I/O APIC, and the first 16 to the two PICs too."""
    io_apic = [IrqchipRoute(pin, lib.KVM_IRQCHIP_IOAPIC, pin) for pin in range(IO_APIC_PINS)]
    chips = (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE)
    pics = [
        IrqchipRoute(number * _PIC_PINS + pin, chip, pin)
        for number, chip in enumerate(chips)
        for pin in range(_PIC_PINS)
    ]
    return io_apic + pics
