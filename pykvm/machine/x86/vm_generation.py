"""VM generation id: a number in guest memory that changes whenever a machine is restored.

Two machines restored from one snapshot would draw the same random numbers. When the number changes
and the device's driver is told so (`pykvm.machine.x86.event_device`), Linux seeds its generator
anew.

Source: Microsoft, "Virtual Machine Generation ID" (2012); Linux drivers/virt/vmgenid.c. Linux 6.1
of Debian is built without that driver.
"""

import uuid
from typing import Final

from pykvm.machine.x86 import aml
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["GENERATION_SIZE", "generation_device", "renew_generation"]

GENERATION_SIZE: Final = 16
"""Bytes of the number: a GUID, random (version 4), as Windows stores one."""


def generation_device(gpa: int, path: str = "VGEN") -> bytes:
    """Return the AML of the device.

    Args:
        gpa: where the number is: a multiple of 8, in a page that the map of memory calls reserved
            or ACPI, so that the guest neither uses nor moves it.
        path: the device's name.

    Raises:
        ValueError: the address is none.
    """
    if gpa % 8 or not 0 <= gpa < 1 << 64:
        raise ValueError(f"no generation id at {gpa:#x}: use a multiple of 8")
    address = aml.package(aml.integer(gpa & 0xFFFF_FFFF), aml.integer(gpa >> 32))
    # ACPICA makes identifiers upper case before Linux compares them (acpi_ns_repair_HID).
    return aml.device(
        path,
        aml.name("_HID", aml.string("PYKV0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.method("ADDR", 0, aml.returns(address)),
    )


def renew_generation(memory: GuestMemory, gpa: int) -> uuid.UUID:
    """Write a new number into guest memory, before the machine runs; return it.

    Of a restored machine the event device's interrupt must be raised next.

    Raises:
        AddressError: there is no guest memory.
    """
    generation = uuid.uuid4()
    memory.write(gpa, generation.bytes_le)
    return generation
