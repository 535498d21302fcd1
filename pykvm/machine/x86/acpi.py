"""ACPI tables of a machine with reduced hardware: no timer, no registers, no PIC of the old kind.

Source: ACPI specification 6.5, chapters 4.1 (hardware-reduced ACPI), 5.2 (tables).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pykvm.machine.x86 import aml

__all__ = ["POWER_OFF", "AcpiTables", "Ports", "build_tables", "pci_root"]

_OEM: Final = b"PYKVM "
_OEM_TABLE: Final = b"PYKVM   "
_CREATOR: Final = b"PYKV"

_SLEEP_TYPE_OFF: Final = 5
POWER_OFF: Final = _SLEEP_TYPE_OFF << 2 | 1 << 5
"""Value by which a guest switches its machine off, at the sleep control port (4.8.3.7)."""

# Flags of the FADT (5.2.9).
_WBINVD: Final = 1 << 0
_POWER_BUTTON_IS_NO_REGISTER: Final = 1 << 4
_SLEEP_BUTTON_IS_NO_REGISTER: Final = 1 << 5
_RESET_REGISTER: Final = 1 << 10
_HARDWARE_REDUCED: Final = 1 << 20
_NO_VGA: Final = 1 << 2
_NO_CMOS_RTC: Final = 1 << 5

_LOCAL_APIC_GPA: Final = 0xFEE0_0000
_IO_APIC_GPA: Final = 0xFEC0_0000


@dataclass(frozen=True)
class Ports:
    """I/O ports of the machine that the tables name.

    Attributes:
        sleep_control: a byte; see `POWER_OFF`.
        sleep_status: a byte.
        reset: a byte.
        reset_value: what a guest writes there to reset the machine.
    """

    sleep_control: int
    sleep_status: int
    reset: int
    reset_value: int


@dataclass(frozen=True)
class AcpiTables:
    """All tables, one after the other.

    Attributes:
        data: the bytes.
        rsdp: GPA of the root pointer.
    """

    data: bytes
    rsdp: int


def pci_root(ecam: int, ecam_size: int, window: tuple[int, int]) -> bytes:
    """Return the AML of a PCI bus without bridges, whose configuration space is reserved.

    Args:
        ecam: GPA of the configuration space.
        ecam_size: its bytes.
        window: GPA and bytes of where BARs lie.
    """
    reserved = aml.device(
        "ECAM",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_CRS", aml.resources(aml.fixed_memory(ecam, ecam_size))),
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.buses(0, 1), aml.memory(*window))),
        reserved,
    )


def build_tables(
    gpa: int,
    apic_ids: Sequence[int],
    ports: Ports,
    devices: bytes,
    ecam: int | None = None,
) -> AcpiTables:
    """Return the tables of a machine.

    Args:
        gpa: where they will be; a multiple of 16.
        apic_ids: APIC id of each processor.
        ports: the machine's ports.
        devices: AML terms of its devices.
        ecam: GPA of the configuration space of PCI bus 0, if there is one.
    """
    placed = bytearray(64)  # the RSDP comes first, and is written last

    def place(table: bytes) -> int:
        at = gpa + len(placed)
        placed.extend(table)
        placed.extend(bytes(-len(placed) % 16))
        return at

    off = aml.package(*map(aml.integer, (_SLEEP_TYPE_OFF, _SLEEP_TYPE_OFF, 0, 0)))
    dsdt = place(_table(b"DSDT", 2, aml.name("\\_S5", off) + aml.scope("\\_SB", devices)))
    entries = [place(_fadt(dsdt, ports)), place(_madt(apic_ids))]
    if ecam is not None:
        entries.append(place(_mcfg(ecam)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    placed[:36] = _rsdp(xsdt)
    return AcpiTables(bytes(placed), gpa)


def _rsdp(xsdt: int) -> bytes:
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0)
    first = first[:8] + bytes([-sum(first) & 0xFF]) + first[9:]
    whole = first + struct.pack("<IQB3x", 36, xsdt, 0)
    return whole[:32] + bytes([-sum(whole) & 0xFF]) + whole[33:]


def _table(signature: bytes, revision: int, content: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        *(signature, 36 + len(content), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1),
    )
    table = header + content
    return table[:9] + bytes([-sum(table) & 0xFF]) + table[10:]


def _port_register(port: int) -> bytes:
    """Return a generic address structure: an 8-bit register at a port (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt: int, ports: Ports) -> bytes:
    table = bytearray(276 - 36)

    def put(offset: int, content: bytes) -> None:
        table[offset - 36 : offset - 36 + len(content)] = content

    put(109, struct.pack("<H", _NO_VGA | _NO_CMOS_RTC))
    flags = _WBINVD | _POWER_BUTTON_IS_NO_REGISTER | _SLEEP_BUTTON_IS_NO_REGISTER
    put(112, struct.pack("<I", flags | _RESET_REGISTER | _HARDWARE_REDUCED))
    put(116, _port_register(ports.reset) + bytes([ports.reset_value]))
    put(131, b"\x05")  # minor revision
    put(140, struct.pack("<Q", dsdt))
    put(244, _port_register(ports.sleep_control))
    put(256, _port_register(ports.sleep_status))
    return _table(b"FACP", 6, bytes(table))


def _madt(apic_ids: Sequence[int]) -> bytes:
    processors = b"".join(
        struct.pack("<BBBBI", 0, 8, uid, apic_id, 1) for uid, apic_id in enumerate(apic_ids)
    )
    io_apic = struct.pack("<BBBBII", 1, 12, 0, 0, _IO_APIC_GPA, 0)
    return _table(b"APIC", 5, struct.pack("<II", _LOCAL_APIC_GPA, 0) + processors + io_apic)


def _mcfg(ecam: int) -> bytes:
    """Return the table of PCI Firmware Specification 3.2, 4.1.2, for bus 0 alone."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", ecam, 0, 0, 0))
