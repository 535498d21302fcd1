"""pykvm.machine.x86.aml: encodings, against the specification and ACPICA's disassembler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.machine.x86 import acpi, aml
from pykvm.machine.x86.event_device import event_device
from pykvm.machine.x86.vm_generation import (
    GENERATION_SIZE,
    generation_device,
    renew_generation,
)
from pykvm.memory.guest_memory import GuestMemory

pytestmark = pytest.mark.unit

PORTS = acpi.Ports(sleep_control=0x600, sleep_status=0x601, reset=0xCF9, reset_value=6)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
        (2**64 - 1, "0effffffffffffffff"),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)
    for path in ("TOOLONG", "A.TOOLONG"):
        with pytest.raises(ValueError, match="TOOLONG"):
            aml.name(path, aml.integer(0))
    with pytest.raises(ValueError, match="in one term"):
        aml.scope("A", bytes(1 << 28))


@pytest.mark.parametrize("size", [0, 50, 57, 58, 59, 4000, 4086, 4087, 4088, 70_000])
def test_lengths(size: int) -> None:
    """The length counts itself, in as few bytes as it takes (20.2.4)."""
    term = aml.scope("\\_SB", bytes(size))
    lead = term[1]
    extra = lead >> 6
    length = lead & 0x3F if not extra else lead & 0xF
    for place in range(extra):
        length |= term[2 + place] << (4 + 8 * place)
    assert length == len(term) - 1
    assert length < 1 << (6 if not extra else 4 + 8 * extra)
    assert not extra or length >= 1 << (6 if extra == 1 else 4 + 8 * (extra - 1))


def test_identifiers() -> None:
    # The specification's own example (6.1.5): PNP0A03 is 0x030AD041.
    assert aml.eisa_id("PNP0A03") == bytes.fromhex("0c41d00a03")


def test_paths() -> None:
    one, two, three = (aml.name(p, b"")[1:] for p in ("\\_SB", "_SB.PCI0", "A.B.C"))
    assert (one, two, three) == (b"\\_SB_", b"\x2e_SB_PCI0", b"\x2f\x03A___B___C___")


def disassembled(table: bytes, directory: Path) -> str:
    """Return what ACPICA's disassembler makes of a table."""
    iasl = shutil.which("iasl")
    assert iasl, "install acpica-tools"
    (directory / "table.aml").write_bytes(table)
    done = subprocess.run(
        [iasl, "-d", "table.aml"], cwd=directory, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "error" not in said.lower().replace("0 errors", ""), said
    return (directory / "table.dsl").read_text()


def table_of(tables: acpi.AcpiTables, signature: bytes) -> bytes:
    at = tables.data.index(signature)
    return tables.data[at : at + int.from_bytes(tables.data[at + 4 : at + 8], "little")]


def test_a_serial_port(tmp_path: Path) -> None:
    device = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.string("first")),
        aml.name("_CRS", aml.resources(aml.ports(0x3F8, 8), aml.interrupt(4))),
    )
    tables = acpi.build_tables(0xE0000, [0], PORTS, device)
    text = disassembled(table_of(tables, b"DSDT"), tmp_path)
    squeezed = " ".join(text.split())
    assert 'Name (_HID, EisaId ("PNP0501")' in squeezed
    assert 'Name (_UID, "first")' in squeezed
    assert "IO (Decode16, 0x03F8, // Range Minimum 0x03F8," in squeezed
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive" in squeezed
    assert "0x00000004," in squeezed
    assert "Name (\\_S5, Package (0x04)" in squeezed


def test_fixed_tables(tmp_path: Path) -> None:
    tables = acpi.build_tables(0xE0000, [0, 2, 5], PORTS, b"")
    fadt = disassembled(table_of(tables, b"FACP"), tmp_path)
    for line in (
        "Hardware Reduced (V5) : 1",
        "Reset Register Supported (V2) : 1",
        "CMOS RTC Not Present (V5) : 1",
        "Value to cause reset : 06",
    ):
        assert line in fadt
    assert "0000000000000CF9" in fadt
    assert "0000000000000600" in fadt
    madt = disassembled(table_of(tables, b"APIC"), tmp_path)
    ids = [line.split(":")[1].strip() for line in madt.splitlines() if "Local Apic ID" in line]
    assert ids == ["00", "02", "05"]


def test_every_table_adds_up_to_zero() -> None:
    tables = acpi.build_tables(0xE0000, range(64), PORTS, b"")
    root = tables.data[:36]
    assert root[:8] == b"RSD PTR "
    assert tables.rsdp == 0xE0000
    assert sum(root[:20]) & 0xFF == sum(root) & 0xFF == 0
    xsdt = int.from_bytes(root[24:32], "little")

    def table(gpa: int) -> bytes:
        at = gpa - 0xE0000
        assert at % 16 == 0
        return tables.data[at : at + int.from_bytes(tables.data[at + 4 : at + 8], "little")]

    listed = table(xsdt)[36:]
    found = [
        table(int.from_bytes(listed[at : at + 8], "little")) for at in range(0, len(listed), 8)
    ]
    assert [one[:4] for one in found] == [b"FACP", b"APIC"]
    dsdt = table(int.from_bytes(found[0][140:148], "little"))
    for one in (table(xsdt), *found, dsdt):
        assert sum(one) & 0xFF == 0
    assert dsdt[:4] == b"DSDT"


def test_a_pci_bus(tmp_path: Path) -> None:
    bus = acpi.pci_root(0xC000_0000, 1 << 20, (0xC100_0000, 16 << 20))
    tables = acpi.build_tables(0xE0000, [0], PORTS, bus, 0xC000_0000)
    mcfg = disassembled(table_of(tables, b"MCFG"), tmp_path)
    assert "Base Address : 00000000C0000000" in mcfg
    assert "End Bus Number : 00" in mcfg
    text = " ".join(disassembled(table_of(tables, b"DSDT"), tmp_path).split())
    assert 'Name (_HID, EisaId ("PNP0A08")' in text
    assert "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode" in text
    assert "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable" in text
    assert "0x00000000C1000000, // Range Minimum 0x00000000C1FFFFFF, // Range Maximum" in text
    assert "Memory32Fixed (ReadWrite, 0xC0000000, // Address Base 0x00100000" in text


def test_a_generation_id_and_what_tells_of_it(tmp_path: Path) -> None:
    devices = generation_device(0x1_2345_6788) + event_device({9: "\\_SB.VGEN", 0x1F0: "\\_SB.B"})
    devices += aml.device("B", aml.name("_HID", aml.eisa_id("PNP0C0C")))
    tables = acpi.build_tables(0xE0000, [0], PORTS, devices)
    text = disassembled(table_of(tables, b"DSDT"), tmp_path)
    squeezed = " ".join(text.split())
    for expected in (
        'Name (_CID, "VM_Gen_Counter")',
        "Method (ADDR, 0, Serialized) { Return (Package (0x02) { 0x23456788, One }) }",
        'Name (_HID, "ACPI0013"',
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000009, }",
        "{ 0x000001F0, }",
        "Method (_EVT, 1, Serialized) // _EVT: Event { If ((Arg0 == 0x09)) "
        "{ Notify (\\_SB.VGEN, 0x80) // Status Change } If ((Arg0 == 0x01F0)) "
        "{ Notify (\\_SB.B, 0x80) // Status Change } }",
    ):
        assert expected in squeezed, text
    iasl = shutil.which("iasl")
    assert iasl
    done = subprocess.run(
        [iasl, "-p", "again", "table.dsl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "0 Errors, 0 Warnings" in done.stdout, done.stdout + done.stderr


def test_a_generation_id_changes() -> None:
    with GuestMemory.create(0x2000) as memory:
        first = renew_generation(memory, 0x1008)
        assert memory.read(0x1000, 0x20) == bytes(8) + first.bytes_le + bytes(8)
        second = renew_generation(memory, 0x1008)
        assert first != second
        assert memory.read(0x1008, GENERATION_SIZE) == second.bytes_le
    for gpa in (0x1004, -8, 1 << 64):
        with pytest.raises(ValueError, match="no generation id"):
            generation_device(gpa)
