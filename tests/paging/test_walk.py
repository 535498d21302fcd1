"""The walker on handmade tables, and the nested walk."""

from __future__ import annotations

import random
from array import array

import pytest

from pykvm.memory.guest_memory import GuestMemory
from pykvm.paging.anywhere_page_table import fill_anywhere
from pykvm.paging.entries import SIZE_1G, SIZE_2M, Access, EptEntry, X86Entry
from pykvm.paging.tables import PageTables, TableAddresses, TableNumbers
from pykvm.paging.walk import Span, walk, walk_nested

pytestmark = pytest.mark.unit

R, W, X, U = Access.READ, Access.WRITE, Access.EXECUTE, Access.USER


def _pages(contents: dict[int, dict[int, int]]) -> dict[int, array[int]]:
    pages = {}
    for address, words in contents.items():
        pages[address] = array("Q", bytes(4096))
        for index, word in words.items():
            pages[address][index] = word
    return pages


def test_by_hand() -> None:
    # GVA 0x2d4cf4c01678: indexes 0x5a, 0x133, 0x1a6, 1.
    pages = _pages(
        {
            0x1000: {0x5A: 0x2007},
            0x2000: {0x133: 0x3003},
            0x3000: {0x1A6: 0x4007},
            0x4000: {1: 0x5005},
        }
    )
    found = walk(0x1018, 0x2D4CF4C01678, X86Entry, pages.__getitem__)  # low bits of CR3 are flags
    assert found.target == 0x5678
    # Writable at some levels only, user at some levels only.
    assert found.access == R | X
    assert str(found) == "GVA 0x2d4cf4c01678 -> GPA 0x5678 [r-xs WB 4K]"
    assert [str(step) for step in found.steps] == [
        "level 4 table 0x1000[0x5a]: table 0x2000 [rwxu]",
        "level 3 table 0x2000[0x133]: table 0x3000 [rwxs]",
        "level 2 table 0x3000[0x1a6]: table 0x4000 [rwxu]",
        "level 1 table 0x4000[0x1]: 0x5000 [r-xu WB 4K]",
    ]


def test_access_is_what_all_levels_allow() -> None:
    pages = _pages(
        {0x1000: {0: 0x2005}, 0x2000: {0: 0x3003}, 0x3000: {0: 0x4007}, 0x4000: {0: 0x5037}}
    )
    found = walk(0x1000, 0, EptEntry, pages.__getitem__)
    assert found.access == R
    assert found.steps[-1].entry.access == R | W | X


def test_invalid_entries_stop_the_walk() -> None:
    pages = _pages({0x1000: {0: 0x2007, 1: 0x2002, 2: 0x208F}, 0x2000: {0: 0x8000_0000_0000_3007}})
    for address, fault in (
        (0, "level 2"),
        (1 << 39, "entry 0x1 at level 4 is invalid (writable but not readable)"),
        (2 << 39, "entry 0x2 at level 4 is invalid (bits 3 to 7 are reserved)"),
        (3 << 39, "entry 0x3 at level 4 is absent"),
        (1 << 48, "needs more than 48 bits"),
    ):
        if address:
            found = walk(0x1000, address, EptEntry, pages.__getitem__)
            assert not found.mapped
            assert found.page is None
            assert fault in found.fault
            assert str(found) == f"GPA {address:#x} -> nothing: {found.fault}"


def test_physical_width() -> None:
    pages = _pages({0x1000: {0: 1 << 40 | 7}})
    found = walk(0x1000, 0, EptEntry, pages.__getitem__, physical_bits=39)
    assert "needs more than 39 bits" in found.fault


def test_tables_in_guest_memory_are_read_in_place() -> None:
    with GuestMemory.create(16 << 20) as memory:
        tables = PageTables(X86Entry, TableAddresses(0x1000, 0x3F000))
        tables.map(0, 0, 16 << 20, R | W | X, max_page=SIZE_2M)
        tables.store(memory.write)
        found = walk(0x1000, 0x12_3456, X86Entry, lambda gpa: memory.view(gpa, 4096).cast("Q"))
        assert (found.target, found.size, found.access) == (0x12_3456, SIZE_2M, R | W | X)
        # The guest changes an entry; the walker sees it.
        memory.write(0x3000, bytes(8))
        found = walk(0x1000, 0x12_3456, X86Entry, lambda gpa: memory.view(gpa, 4096).cast("Q"))
        assert found.fault == "entry 0x0 at level 2 is absent"


def test_spans_join_what_goes_on_alike() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    ept.map(SIZE_1G - SIZE_2M, 4 * SIZE_1G - SIZE_2M, SIZE_1G, R, max_page=SIZE_1G)
    ept.map_pages(4 * SIZE_1G, 9, 1, R)
    ept.map_pages(4 * SIZE_1G + 4096, 9, 1, R)
    ept.map_pages(4 * SIZE_1G + 8192, 10, 1, R)
    ept.map_pages(4 * SIZE_1G + 12288, 11, 1, R | W)
    base = 4 * SIZE_1G
    assert list(ept.spans()) == [
        Span(SIZE_1G - SIZE_2M, SIZE_1G, base - SIZE_2M, R, ept.walk(base).memory_type),
        Span(base, 8192, 9 << 12, R, ept.walk(base).memory_type, True),
        Span(base + 8192, 4096, 10 << 12, R, ept.walk(base).memory_type),
        Span(base + 12288, 4096, 11 << 12, R | W, ept.walk(base).memory_type),
    ]
    # A part of it.
    assert [(span.start, span.size, span.target) for span in ept.spans(SIZE_1G, 4096)] == [
        (SIZE_1G, 4096, base)
    ]
    assert list(ept.spans(SIZE_1G, 0)) == []
    # Nothing is mapped above the width of the tables, even if the index is in use.
    assert list(ept.spans((1 << 48) + SIZE_1G, 4096)) == []
    assert list(ept.spans((1 << 48) + SIZE_1G)) == []


# ---- Nested ----


class Machine:
    """A context with guest tables, as data: an EPT over numbered pages."""

    def __init__(self) -> None:
        self.ept = PageTables(EptEntry, TableNumbers())
        self.pages: dict[int, array[int]] = {}

    def read(self, target: int) -> array[int]:
        return self.pages[target >> 12]


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    guest = PageTables(X86Entry, TableAddresses(0x40_0010_0000, 0x10000))
    guest.map(0x2D4C_F4C0_1000, 0x40_0000_1000, 4096, R | X)
    guest.map(0x2D4C_F4C0_5000, 0x40_0000_5000, 4096, R | W | X | U)
    guest.map(0x2D4C_F4C0_6000, 0x40_0000_6000, 4096, R | X)
    for number in range(len(guest)):
        machine.pages[number] = guest.table(number)
    machine.ept.map_pages(0x40_0010_0000, 0, len(guest), R)
    machine.ept.map_pages(0x40_0000_1000, 20, 1, R | X)
    machine.ept.map_pages(0x40_0000_5000, 21, 1, R | W)
    return machine


def test_nested_walk(machine: Machine) -> None:
    def look(gva: int, cr3: int = 0x40_0010_0000) -> str:
        return str(walk_nested(gva, cr3, machine.ept.walk, machine.read))

    assert look(0x2D4C_F4C0_1000) == (
        "GVA 0x2d4cf4c01000 -> GPA 0x4000001000 [r-xs WB 4K], "
        "GPA 0x4000001000 -> page 20 [r-x WB 4K]"
    )
    found = walk_nested(0x2D4C_F4C0_5008, 0x40_0010_0000, machine.ept.walk, machine.read)
    assert found.mapped
    assert found.target == 21 << 12 | 8
    assert found.access == R | W | U
    assert look(0x2D4C_F4C0_2000) == (
        "GVA 0x2d4cf4c02000 -> nothing: entry 0x2 at level 1 is absent"
    )
    assert look(0x2D4C_F4C0_6000) == (
        "GVA 0x2d4cf4c06000 -> nothing: GPA 0x4000006000 -> nothing: entry 0x6 at level 1 is absent"
    )
    assert look(0x2D4C_F4C0_1000, cr3=0x1000).startswith(
        "GVA 0x2d4cf4c01000 -> nothing: guest table at GPA 0x1000 -> nothing"
    )


def test_tables_that_may_only_be_executed_are_not_read(machine: Machine) -> None:
    machine.ept.map_pages(0x1000, 0, 1, X)
    found = walk_nested(0x2D4C_F4C0_1000, 0x1000, machine.ept.walk, machine.read)
    assert "may not be read" in found.fault


def test_every_cr3_finds_the_root(machine: Machine) -> None:
    fill_anywhere(machine.ept, 0)
    rng = random.Random(1)
    for cr3 in [0, 0x1000, (1 << 48) - 4096] + [rng.randrange(1 << 36) << 12 for _ in range(100)]:
        found = walk_nested(0x2D4C_F4C0_1234, cr3, machine.ept.walk, machine.read)
        assert found.target == 20 << 12 | 0x234
        assert found.access == R | X
