"""ACPI's Generic Event Device: interrupts by which a machine tells drivers about events.

A machine with reduced hardware has no SCI and no general-purpose events. This device takes their
place: the guest evaluates its `_EVT` method with the number of each interrupt that arrives.

Source: ACPI specification 6.5, 5.6.9 (Interrupt-signaled ACPI events); Linux drivers/acpi/evged.c.
"""

from collections.abc import Mapping
from typing import Final

from pykvm.machine.x86 import aml

__all__ = ["STATUS_CHANGE", "event_device"]

STATUS_CHANGE: Final = 0x80
"""Event whose meaning a kind of device defines for itself (5.6.6)."""


def event_device(events: Mapping[int, str], path: str = "GED0") -> bytes:
    """Return the AML of the device.

    Args:
        events: by GSI, the path of the device to which `STATUS_CHANGE` goes. Each is an
            edge-triggered input of the IOAPIC: a pulse is an event.
        path: its own name.
    """
    interrupts = [aml.interrupt(gsi) for gsi in events]
    notified = [
        aml.if_equal(aml.ARG0, aml.integer(gsi), aml.notify(device, STATUS_CHANGE))
        for gsi, device in events.items()
    ]
    return aml.device(
        path,
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*interrupts)),
        aml.method("_EVT", 1, *notified),
    )
