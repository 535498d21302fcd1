"""Ways in which an interrupt, an NMI or INIT reaches a guest's first vCPU."""

from collections.abc import Callable, Mapping
from typing import Final

from pykvm.kvm import Io, Vcpu
from pykvm.machine.bare import boot_info, layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import Probe

VECTOR: Final = 0x55
NMI: Final = 2
# SDM vol. 3A, 11.6.1 and 11.11: bits of the interrupt command register and of a message's data.
NMI_DELIVERY: Final = 4 << 8
INIT_DELIVERY: Final = 5 << 8
ASSERT_LEVEL: Final = 1 << 14
SELF_IPI: Final = 0x83F  # MSR
_MSI_ADDRESS: Final = 0xFEE0_0000  # addresses the local APIC with id 0


def signal(guest: BareGuest, data: int = VECTOR) -> None:
    """Signal an MSI as a device of the host does (KVM_SIGNAL_MSI).

    Args:
        data: a vector, or NMI_DELIVERY.
    """
    guest.vm.signal_msi(_MSI_ADDRESS, data)


def send_ipi(guest: BareGuest, command: int) -> Vcpu:
    """Let a second vCPU of the guest send one interrupt; return that vCPU.

    Args:
        command: interrupt command register in x2APIC mode (SDM vol. 3A, figure 11-28).
    """
    image = Probe().image()
    vcpu = guest.vm.create_vcpu(1)
    guest.start_vcpu(vcpu, image.address_of("second_start"), layout.STACK_GPA + 0x1000, command)
    exit = vcpu.run()
    assert isinstance(exit, Io), exit
    assert exit.port == boot_info.FINISH_PORT, exit
    return vcpu


EVENTS: Final[Mapping[str, tuple[int, Callable[[BareGuest], object]]]] = {
    "interrupt of the host": (VECTOR, signal),
    "NMI": (NMI, lambda guest: signal(guest, NMI_DELIVERY)),
    "interrupt of another vCPU": (VECTOR, lambda guest: send_ipi(guest, VECTOR | ASSERT_LEVEL)),
    "NMI of another vCPU": (NMI, lambda guest: send_ipi(guest, NMI_DELIVERY | ASSERT_LEVEL)),
}
"""Vector that the handler sees, and the function that raises the event."""
