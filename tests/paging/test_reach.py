"""Invariant I3 by enumeration, and the enumeration against the walker."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.elisa import crossing
from pykvm.paging.anywhere_page_table import fill_anywhere
from pykvm.paging.entries import EPTP, Access, EptEntry, X86Entry
from pykvm.paging.reach import Reach, reachable_from
from pykvm.paging.tables import PageTables, TableAddresses, TableNumbers
from pykvm.paging.walk import walk_nested

pytestmark = pytest.mark.unit

R, W, X, U = Access.READ, Access.WRITE, Access.EXECUTE, Access.USER
PRIVATE = (crossing.PRIVATE_GPA_FIRST, crossing.PRIVATE_GPA_END)

CODE, LIST, DATA, TABLES = 0, 1, 2, 3  # page numbers of a gate context


@dataclass
class Gate:
    """A gate context as `pykvm.elisa` lays it out: EPT, contents of the pages, private GPAs."""

    ept: PageTables[EptEntry]
    pages: list[array[int]]
    private: list[int]
    root: int

    def reach(self, cr3: int) -> list[Reach]:
        return reachable_from(cr3, self.ept, lambda target: self.pages[target >> 12])

    def executable(self) -> list[tuple[int, Reach]]:
        """Return the executable ranges if CR3 names one of the gate's own pages below the root."""
        return [
            (cr3, reach)
            for cr3 in self.private
            if cr3 != self.root
            for reach in self.reach(cr3)
            if reach.access & X
        ]


def _gate(
    list_words: list[int], *, base: int = crossing.CROSSING_GVA, exclude: tuple[int, int] = PRIVATE
) -> Gate:
    private = crossing.GATE_PRIVATE_GPA
    places = [
        (crossing.GATE_OFFSET, private + 0x1000, CODE, R | X),
        (crossing.GATE_LIST_OFFSET, private + 0x4000, LIST, R | W),
        (crossing.GATE_DATA_OFFSET, private + 0x5000, DATA, R),
    ]
    root = private + crossing.PRIVATE_TABLES_OFFSET
    guest = PageTables(X86Entry, TableAddresses(root, crossing.PRIVATE_TABLES_SIZE))
    ept = PageTables(EptEntry, TableNumbers())
    for offset, gpa, page, access in places:
        guest.map(base + offset, gpa, 4096, access | R | X)
        ept.map_pages(gpa, page, 1, access)
    ept.map_pages(root, TABLES, len(guest), R)
    fill_anywhere(ept, TABLES << 12, exclude=exclude)
    code = array("Q", b"\xcc" * 4096)
    words = array("Q", list_words + [0] * (512 - len(list_words)))
    data = array("Q", [EPTP.of(0x7654_3000)] + [0] * 511)
    tables = [guest.table(number) for number in range(len(guest))]
    own = [gpa for _, gpa, _, _ in places]
    own += [root + number * 4096 for number in range(len(guest))]
    return Gate(ept, [code, words, data, *tables], own, root)


@settings(max_examples=50)
@given(st.lists(st.integers(0, (1 << 40) - 1), max_size=512))
def test_gate_reaches_no_code_from_its_own_pages(frames: list[int]) -> None:
    gate = _gate([EPTP.of(frame << 12) for frame in frames])
    assert gate.executable() == []


@settings(max_examples=30)
@given(st.integers(3, (1 << 26) - 2))
def test_other_crossing_bases(block: int) -> None:
    base = block * crossing.CROSSING_ALIGN + (crossing.CROSSING_MIN_GVA & ~0x1FFFFF)
    if base < (1 << 47) - crossing.CROSSING_ALIGN:
        assert _gate([], base=base).executable() == []


def test_from_anywhere_else_exactly_the_gate_page_can_be_executed() -> None:
    gate = _gate([EPTP.of(0x1000)])
    rng = random.Random(2)
    outside = [0, 0x1000, PRIVATE[0] - 4096, PRIVATE[1], (1 << 48) - 4096]
    outside += [rng.randrange(1 << 26) << 12 for _ in range(20)]
    for cr3 in [*outside, gate.root]:
        found = [reach for reach in gate.reach(cr3) if reach.access & X]
        assert [(reach.gva, reach.size, reach.page, reach.access) for reach in found] == [
            (crossing.CROSSING_GVA + crossing.GATE_OFFSET, 4096, CODE, R | X)
        ]
    inside = [PRIVATE[0], crossing.SUB_PRIVATE_GPA + 0x1000, PRIVATE[1] - 4096]
    for cr3 in inside:
        assert gate.reach(cr3) == []


def test_control_a_list_page_that_names_a_table_leads_to_code() -> None:
    """Control: the check finds a present entry in the list page that names the PDPT."""
    gate = _gate([])
    tables = crossing.GATE_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET
    pdpt = gate.pages[TABLES][crossing.CROSSING_GVA >> 39 & 511] & ~0xFFF
    assert tables < pdpt < tables + 0x10000
    gate.pages[LIST][17] = pdpt | 1
    list_gpa = crossing.GATE_PRIVATE_GPA + 0x4000
    found = gate.executable()
    assert (list_gpa, CODE) in [(cr3, reach.page) for cr3, reach in found]
    for cr3, reach in found:
        assert reach.page == CODE
        there = walk_nested(reach.gva, cr3, gate.ept.walk, lambda target: gate.pages[target >> 12])
        assert there.access & X


def test_control_without_the_excluded_range_private_gpas_pass_the_gate() -> None:
    """Control: without I3 the gate lets in a CR3 that names a table of the sub context's.

    Its Anywhere Page Table then fills the private range too.
    """
    gate = _gate([], exclude=(0, 0))
    found = gate.reach(crossing.SUB_MEMORY_GPA)
    assert [reach.page for reach in found if reach.access & X] == [CODE]


def test_large_pages_of_the_guest_cover_what_the_ept_has() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    ept.map_pages(0x10_0000, 0, 1, R)
    ept.map_pages(0x20_0000, 5, 2, R | X)
    ept.map_pages(0x20_3000, 9, 1, R | W)
    root = array("Q", [0] * 512)
    root[511] = 0x10_0000 | 0x23  # itself, read as a PDPT, then as a PD
    root[510] = 0x20_00E3  # a large page if read as a PD; an invalid entry in the PML4
    found = reachable_from(0x10_0000, ept, {0: root}.__getitem__)
    large = [reach for reach in found if reach.gva < 0xFFFF_FFFF_FFE0_0000]
    assert [(reach.gva, reach.size, reach.page, reach.access) for reach in large] == [
        (0xFFFF_FFFF_FFC0_0000, 0x2000, 5, R | X),
        (0xFFFF_FFFF_FFC0_3000, 0x1000, 9, R | W),
    ]
    # At level 3 the same entry asks for 1 GiB at an address that is not aligned to it.
    assert not any(reach.gva < 0xFFFF_FFFF_C000_0000 for reach in found)


def test_five_levels() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    guest = PageTables(X86Entry, TableAddresses(0x1000, 0x10000), levels=5)
    guest.map(0xFF00_0000_0000_0000, 0x20_0000, 4096, R | X | U)
    ept.map_pages(0x1000, 0, len(guest), R)
    ept.map_pages(0x20_0000, 99, 1, X)
    found = reachable_from(0x1000, ept, lambda target: guest.table(target >> 12), levels=5)
    assert [str(reach) for reach in found] == [
        "GVA 0xff00000000000000, 0x1000 bytes -> page 99 [--x, guest r-xu]"
    ]


words = st.one_of(
    st.builds(
        lambda page, flags: page << 12 | flags,
        st.integers(0, 7),
        st.sampled_from([1, 3, 7, 0x23, 0x81, 0x87, 0, 6]),
    ),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=200)
@given(
    st.lists(
        st.dictionaries(st.sampled_from([0, 1, 2, 255, 256, 511]), words), min_size=6, max_size=6
    ),
    st.lists(st.sampled_from([R, R | W, R | X, X]), min_size=6, max_size=6),
    st.booleans(),
    st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 255, 256, 511]), min_size=4, max_size=4)),
)
def test_enumeration_agrees_with_the_walker(
    contents: list[dict[int, int]],
    access: list[Access],
    anywhere: bool,
    paths: list[list[int]],
) -> None:
    """With any page contents and any root, a GVA translates if and only if it is listed."""
    ept = PageTables(EptEntry, TableNumbers())
    pages = []
    for number, content in enumerate(contents):
        page = array("Q", bytes(4096))
        for index, word in content.items():
            page[index] = word
        pages.append(page)
        ept.map_pages(number << 12, number, 1, access[number])
    if anywhere:
        fill_anywhere(ept, 0)

    def read(target: int) -> array[int]:
        return pages[target >> 12]

    found = reachable_from(0x1000, ept, read)
    gvas = []
    for path in paths:
        gva = sum(index << shift for index, shift in zip(path, (39, 30, 21, 12), strict=True))
        gvas.append(gva | 0xFFFF << 48 if gva >> 47 else gva)
    for reach in found:
        gvas += [reach.gva, reach.gva + reach.size - 4096]
    for gva in gvas:
        here = [reach for reach in found if reach.gva <= gva < reach.gva + reach.size]
        there = walk_nested(gva, 0x1000, ept.walk, read)
        if not there.mapped:
            assert here == []
            continue
        assert len(here) == 1
        assert there.page is not None
        offset = 0 if here[0].repeats else (gva - here[0].gva) >> 12
        assert here[0].page + offset == there.page.page
        assert here[0].access == there.page.access
        assert there.guest is not None
        assert here[0].guest == there.guest.access
