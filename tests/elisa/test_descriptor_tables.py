"""I8: VMFUNC is off while a descriptor table of the guest overlaps its contexts' addresses.

Otherwise an event in a context would be delivered through memory that the guest may write.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import HUGE_2M
from pykvm.paging.entries import Access
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from tests.rigs.probe import (
    Probe,
    Step,
    Table,
    What,
    faults,
    give,
    results,
    run,
)

pytestmark = pytest.mark.elisa

INVALID_OPCODE = 6
C = crossing.CROSSING_GVA
GUESTS = 2
FIRST = C + crossing.GATE_DATA_OFFSET  # first address that the contexts of these tests map
END = C + crossing.SHARED_OFFSET + HUGE_2M  # of the large page with all of the object's memory

IDT_LIMIT = 0xFFF
GDT_SIZE = 5 * 8  # null, code, data, TSS
TSS_LIMIT = 0x67
COPY_GPA = layout.CAPTURE_GPA + 0x10_0000  # two pages with a copy of a table
OTHER_SELECTOR = 0x28  # of the descriptor after the guest's own ones
READ_WRITE = Access.READ | Access.WRITE

INSIDE = {
    "gate's data": C + crossing.GATE_DATA_OFFSET,
    "gate's list": C + crossing.GATE_LIST_OFFSET,
    "between": C - 0x100_0000,
    "gate page": C + crossing.GATE_OFFSET,
    "sub entry page": C + crossing.SUB_ENTRY_OFFSET,
    "list page": C + crossing.LIST_OFFSET,
    "stack": C + crossing.STACK_OFFSET,
    "image": C + crossing.IMAGE_OFFSET,
    "shared memory": C + crossing.SHARED_OFFSET,
    "own window": C + crossing.SHARED_OFFSET + PAGE_SIZE,
    "another's window": C + crossing.SHARED_OFFSET + 2 * PAGE_SIZE,
}


@pytest.fixture
def counter() -> Iterator[ObjectInstance]:
    source = GUEST_SOURCES / "objects" / "counter.c"
    with SharedObject("counter", source, guests=GUESTS).open() as instance:
        yield instance


@dataclass(frozen=True)
class Place:
    """A table at `base` whose last byte is at `base + limit`."""

    base: int
    limit: int

    @classmethod
    def ending_with(cls, last: int, limit: int) -> "Place":
        return cls(last - limit, limit)


def idt_of(guest: BareGuest) -> bytes:
    """Return the guest's IDT, once the guest has filled it."""
    return guest.memory.read(Probe().image().address_of("interrupt_table"), IDT_LIMIT + 1)


def map_copy(guest: BareGuest, base: int) -> None:
    """Map memory at `base` for a table in the guest's own page tables; `fill_copy` fills it."""
    pages = 2 if base % PAGE_SIZE else 1
    guest.map(base & -PAGE_SIZE, COPY_GPA, pages * PAGE_SIZE, READ_WRITE)


def fill_copy(guest: BareGuest, base: int, table: bytes) -> None:
    guest.memory.write(COPY_GPA + base % PAGE_SIZE, table)


def try_vmfunc() -> Step:
    return Step(What.VMFUNC, 0, 0, attempt=True)


def try_call(slot: int) -> Step:
    return Step(What.CALL, 1, slot=slot, attempt=True)


def with_table(
    guest: BareGuest, counter: ObjectInstance, which: Table, place: Place, own: Place
) -> list[int | None]:
    """Return the vectors of a VMFUNC and a call before, while and after the register names `place`.

    The guest really uses the table there: `place` is mapped and holds a copy of the right one.
    """
    slot = counter.attach(guest).slot
    map_copy(guest, place.base)

    def on_mark(_: int) -> None:
        table = idt_of(guest) if which is Table.IDT else guest.memory.read(own.base, GDT_SIZE)
        fill_copy(guest, place.base, table)

    give(
        guest,
        Step(What.MARK),
        try_vmfunc(),
        try_call(slot),
        Step(What.LOAD_TABLE, which, place.base, place.limit),
        try_vmfunc(),
        try_call(slot),
        Step(What.STORE_TABLE, which),
        Step(What.STORE_TABLE, which, 1),
        Step(What.LOAD_TABLE, which, own.base, own.limit),
        try_vmfunc(),
        try_call(slot),
        Step(What.STORE_TABLE, which),
    )
    assert run(guest, on_mark) == []
    values, vectors = results(guest), faults(guest)
    assert (values[6], values[7], values[11]) == (place.base, place.limit, own.base)
    assert vectors[1:4] == [None] * 3
    assert vectors[9:] == [None] * 3
    return vectors[4:6]


OFF, ON = [INVALID_OPCODE] * 2, [None] * 2


def own_idt() -> Place:
    return Place(Probe().image().address_of("interrupt_table"), IDT_LIMIT)


OWN_GDT = Place(layout.GDT_GPA, GDT_SIZE - 1)


@pytest.mark.attack("T9")
@pytest.mark.parametrize("name", INSIDE)
def test_idt_inside(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    place = Place(INSIDE[name], IDT_LIMIT)
    assert with_table(guest, counter, Table.IDT, place, own_idt()) == OFF


@pytest.mark.attack("T9")
@pytest.mark.parametrize("name", ["gate page", "own window"])
def test_gdt_inside(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    place = Place(INSIDE[name] + 0x120, GDT_SIZE - 1)
    assert with_table(guest, counter, Table.GDT, place, OWN_GDT) == OFF


EDGES = {
    "last byte is the first that is mapped": (Place.ending_with(FIRST, IDT_LIMIT), OFF),
    "ends before": (Place.ending_with(FIRST - 1, IDT_LIMIT), ON),
    "begins with the last byte": (Place(END - 1, IDT_LIMIT), OFF),
    "begins behind": (Place(END, IDT_LIMIT), ON),
    "far away": (Place(0x7000_0000, IDT_LIMIT), ON),
    "in the upper half": (Place(0xFFFF_8800_0000_0000, IDT_LIMIT), ON),
}


@pytest.mark.attack("T9")
@pytest.mark.parametrize("name", EDGES)
def test_idt_at_the_edges(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    place, expected = EDGES[name]
    assert with_table(guest, counter, Table.IDT, place, own_idt()) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place.ending_with(FIRST, GDT_SIZE - 1), OFF),
        (Place.ending_with(FIRST - 1, GDT_SIZE - 1), ON),
        (Place.ending_with(FIRST - 1 + 0x8000, 0xFFFF), OFF),
        (Place(END, 0xFFFF), ON),
    ],
    ids=["last byte", "ends before", "largest, across the start", "largest, behind"],
)
def test_gdt_at_the_edges(
    guest: BareGuest, counter: ObjectInstance, place: Place, expected: list[int | None]
) -> None:
    assert with_table(guest, counter, Table.GDT, place, OWN_GDT) == expected


# ---- registers that name a descriptor ------------------------------------------------------------

_LDT_TYPE, _TSS_TYPE = 0x82, 0x89


def descriptor(base: int, limit: int, kind: int) -> bytes:
    """Return a system descriptor of 16 bytes (SDM vol. 3A, figure 8-4)."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | kind << 40 | (base >> 24 & 0xFF) << 56
    low |= (limit >> 16 & 0xF) << 48
    return low.to_bytes(8, "little") + (base >> 32).to_bytes(8, "little")


SEGMENTS = {
    "gate page": (C + crossing.GATE_OFFSET, TSS_LIMIT, OFF),
    "own window": (INSIDE["own window"] + 8, TSS_LIMIT, OFF),
    "last byte": (FIRST - TSS_LIMIT, TSS_LIMIT, OFF),
    "ends before": (FIRST - TSS_LIMIT - 1, TSS_LIMIT, ON),
    "behind": (END, TSS_LIMIT, ON),
    "a megabyte across the start": (FIRST - 0x1000, 0xFFFFF, OFF),
}


@pytest.mark.attack("T9")
@pytest.mark.parametrize("which", [Table.TASK, Table.LDT], ids=["TR", "LDTR"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(guest: BareGuest, counter: ObjectInstance, which: Table, name: str) -> None:
    base, limit, expected = SEGMENTS[name]
    slot = counter.attach(guest).slot
    kind = _TSS_TYPE if which is Table.TASK else _LDT_TYPE
    back = layout.GDT_GPA + OTHER_SELECTOR + 16  # then a descriptor of a harmless place
    guest.memory.write(layout.GDT_GPA + OTHER_SELECTOR, descriptor(base, limit, kind))
    guest.memory.write(back, descriptor(layout.TSS_GPA, TSS_LIMIT, kind))
    map_copy(guest, base)
    give(
        guest,
        Step(What.LOAD_TABLE, Table.GDT, layout.GDT_GPA, OTHER_SELECTOR + 32 - 1),
        try_call(slot),
        Step(What.LOAD_TABLE, which, OTHER_SELECTOR),
        try_vmfunc(),
        try_call(slot),
        Step(What.STORE_TABLE, which),
        Step(What.LOAD_TABLE, which, OTHER_SELECTOR + 16),
        try_vmfunc(),
        try_call(slot),
    )
    assert run(guest) == []
    vectors = faults(guest)
    assert vectors[3:5] == expected
    assert vectors[:3] + vectors[5:] == [None] * 7
    assert results(guest)[5] == OTHER_SELECTOR


def test_no_local_descriptor_table(guest: BareGuest, counter: ObjectInstance) -> None:
    """With the null selector there is no table, whatever the register's old base."""
    slot = counter.attach(guest).slot
    gate = INSIDE["gate page"]
    guest.memory.write(layout.GDT_GPA + OTHER_SELECTOR, descriptor(gate, 0xFF, _LDT_TYPE))
    give(
        guest,
        Step(What.LOAD_TABLE, Table.GDT, layout.GDT_GPA, OTHER_SELECTOR + 16 - 1),
        Step(What.LOAD_TABLE, Table.LDT, OTHER_SELECTOR),
        try_call(slot),
        Step(What.LOAD_TABLE, Table.LDT, 0),
        try_call(slot),
    )
    assert run(guest) == []
    assert faults(guest) == [None, None, INVALID_OPCODE, None, None]


# ---- other ways to set them ----------------------------------------------------------------------


def test_set_by_the_vmm(guest: BareGuest, counter: ObjectInstance) -> None:
    """KVM_SET_SREGS is checked like the guest's own instructions."""
    slot = counter.attach(guest).slot
    place = INSIDE["own window"]
    map_copy(guest, place)

    def on_mark(value: int) -> None:
        guest.vcpu.complete()
        fill_copy(guest, place, idt_of(guest))
        sregs = guest.vcpu.get_sregs()
        sregs.idt.base = place if value == 0 else own_idt().base
        guest.vcpu.set_sregs(sregs)

    give(
        guest,
        Step(What.MARK, 0),
        try_call(slot),
        Step(What.STORE_TABLE, Table.IDT),
        Step(What.MARK, 1),
        try_call(slot),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [None, INVALID_OPCODE, None, None, None]
    assert results(guest)[2] == place


def test_attached_to_tables_in_the_way(guest: BareGuest, counter: ObjectInstance) -> None:
    """The tables were there before the context; a first attachment elsewhere is unaffected."""
    place = INSIDE["own window"]
    map_copy(guest, place)

    def on_mark(value: int) -> None:
        if value == 0:
            fill_copy(guest, place, idt_of(guest))
        else:
            counter.attach(guest)

    give(
        guest,
        Step(What.MARK, 0),
        Step(What.LOAD_TABLE, Table.IDT, place, IDT_LIMIT),
        Step(What.MARK, 1),
        try_vmfunc(),
        Step(What.LOAD_TABLE, Table.IDT, own_idt().base, IDT_LIMIT),
        try_vmfunc(),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [None, None, None, INVALID_OPCODE, None, None]


def test_another_object_somewhere_else(guest: BareGuest, counter: ObjectInstance) -> None:
    """The tables must overlap no attached object, wherever it is; detaching frees the place."""
    second_area = 0x3B4C_F4C0_0000
    first = counter.attach(guest)
    second = counter.attach_vcpu(guest.vcpu, 1, crossing_gva=second_area)
    place = second_area + crossing.GATE_OFFSET
    map_copy(guest, place)

    def on_mark(value: int) -> None:
        if value == 0:
            fill_copy(guest, place, idt_of(guest))
        else:
            second.detach()

    give(
        guest,
        Step(What.MARK, 0),
        try_call(first.slot),
        Step(What.LOAD_TABLE, Table.IDT, place, IDT_LIMIT),
        try_call(first.slot),
        Step(What.MARK, 1),
        try_call(first.slot),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [None, None, None, INVALID_OPCODE, None, None]
