"""Plans of gate and sub contexts against the invariants that they hold by construction."""

from __future__ import annotations

from array import array

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.contexts import (
    READ_EXECUTE,
    ContextPlan,
    CrossingBaseError,
    ListPage,
    UserPages,
    plan_gate,
    plan_sub,
)
from pykvm.elisa.trusted_images import crossing_images
from pykvm.paging.entries import EPTP, Access, EptEntry
from pykvm.paging.reach import reachable_from
from pykvm.sizes import GIB, PAGE_SIZE

pytestmark = pytest.mark.unit

BASES = [crossing.CROSSING_GVA, 5 << 30, 0xFFFF_FFFF_8000_0000, 0xFFFF_C900_0020_0000]
MEMORY = 1200 * PAGE_SIZE  # more than one 2 MiB page, and a remainder
LARGE = 3 << 21  # the whole large pages that hold it


def complete(plan: ContextPlan) -> tuple[ContextPlan, memoryview]:
    """Place the plan's guest tables in memory of the test's own."""
    memory = memoryview(bytearray(plan.guest_table_bytes))
    plan.place_guest_tables(memory, 0x70_0000_0000)
    return plan, memory


def gate_plan(base: int) -> ContextPlan:
    return plan_gate(0x7000_0000, base)


def sub_plan(base: int, *, user: bool = False, memory: int = MEMORY) -> ContextPlan:
    return plan_sub(
        [
            (crossing.SUB_ENTRY_OFFSET, UserPages(0x1000), READ_EXECUTE),
            (crossing.IMAGE_OFFSET, UserPages(0x2000, 3), READ_EXECUTE),
        ],
        0x8000,
        0x9000,
        memory,
        base,
        user=user,
    )


def page_words(plan: ContextPlan, tables: memoryview) -> dict[int, array[int]]:
    """Return the content of each page of a gate context by page number times 4096.

    Guest tables are as built, code is as assembled, and all else is EPTPs of write-back memory.
    """
    eptps = array("Q", [int(EPTP.of(0x1234_5000 + i * PAGE_SIZE)) for i in range(512)])
    words: dict[int, array[int]] = {}
    number = 0
    for page in plan.pages:
        for i in range(page.count):
            content = eptps
            if isinstance(page, UserPages) and page.address == 0x7000_0000:
                content = array("Q", crossing_images().gate_page)
            elif isinstance(page, UserPages):
                content = array("Q", bytes(tables[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]))
            words[number * PAGE_SIZE] = content
            number += 1
    return words


@pytest.mark.parametrize("base", BASES)
def test_any_cr3_outside_the_private_range_finds_the_same_gate(base: int) -> None:
    plan, tables = complete(gate_plan(base))
    words = page_words(plan, tables)
    found = {
        tuple(
            (reach.gva, reach.size, reach.page)
            for reach in reachable_from(cr3, plan.ept, words.__getitem__)
            if reach.access & Access.EXECUTE
        )
        for cr3 in (0, 0x1000, crossing.PRIVATE_GPA_FIRST - PAGE_SIZE, crossing.PRIVATE_GPA_END)
    }
    assert found == {((base + crossing.GATE_OFFSET, PAGE_SIZE, 0),)}


@pytest.mark.attack("T6")
@pytest.mark.parametrize("base", BASES)
def test_i3_no_private_page_of_the_gate_read_as_root_reaches_code(base: int) -> None:
    plan, tables = complete(gate_plan(base))
    words = page_words(plan, tables)
    private = [
        span.start + at
        for span in plan.ept.spans(
            crossing.PRIVATE_GPA_FIRST, crossing.PRIVATE_GPA_END - crossing.PRIVATE_GPA_FIRST
        )
        for at in range(0, span.size, PAGE_SIZE)
    ]
    assert len(private) == 3 + len(plan.guest)
    root = crossing.GATE_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET
    for cr3 in private:
        code = [
            reach
            for reach in reachable_from(cr3, plan.ept, words.__getitem__)
            if reach.access & Access.EXECUTE
        ]
        assert bool(code) == (cr3 == root), f"CR3 {cr3:#x}: {code}"


@pytest.mark.attack("T5")
@pytest.mark.parametrize("base", BASES)
def test_i3_what_a_sub_context_maps_is_absent_in_the_gate(base: int) -> None:
    gate, _ = complete(gate_plan(base))
    sub, _ = complete(sub_plan(base))
    root_page = sub.ept.walk(0).page
    assert root_page is not None
    checked = 0
    for span in sub.ept.spans():
        if span.target == root_page * PAGE_SIZE and (span.repeats or span.size == PAGE_SIZE):
            continue
        assert not list(gate.ept.spans(span.start, span.size)), span
        checked += span.size
    assert checked == (4 + 1 + 1 + 4 + len(sub.guest) - 1) * PAGE_SIZE + GIB


@pytest.mark.parametrize("base", [*BASES, 1 << 52])
def test_i3_with_five_levels(base: int) -> None:
    """The invariant also holds for guests with CR4.LA57, and for GVAs that only they have."""
    gate, tables = complete(plan_gate(0x7000_0000, base, levels=5))
    words = page_words(gate, tables)
    root = crossing.GATE_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET
    for span in gate.ept.spans(
        crossing.PRIVATE_GPA_FIRST, crossing.PRIVATE_GPA_END - crossing.PRIVATE_GPA_FIRST
    ):
        for cr3 in range(span.start, span.end, PAGE_SIZE):
            code = {
                reach.gva
                for reach in reachable_from(cr3, gate.ept, words.__getitem__, levels=5)
                if reach.access & Access.EXECUTE
            }
            assert code == ({base + crossing.GATE_OFFSET} if cr3 == root else set()), hex(cr3)
    assert (gate.levels, gate.gva) == (5, base + crossing.GATE_DATA_OFFSET)


@pytest.mark.attack("T16")
@pytest.mark.parametrize("plan", [gate_plan(BASES[0]), sub_plan(BASES[0])], ids=["gate", "sub"])
def test_i4_tables_are_read_only_and_nothing_writable_is_executable(plan: ContextPlan) -> None:
    complete(plan)
    tables = plan.ept.walk(0).page
    assert tables is not None
    for span in plan.ept.spans():
        assert not (span.access & Access.WRITE and span.access & Access.EXECUTE)
        first = span.target // PAGE_SIZE
        if tables <= first < tables + len(plan.guest):
            assert span.access == Access.READ
    # Accessed and dirty bits are set; the processor's own walk would otherwise have to write.
    for number in range(len(plan.guest)):
        for word in plan.guest.table(number):
            assert not word or word & 0x20, hex(word)


@pytest.mark.attack("T27")
@pytest.mark.parametrize("plan", [gate_plan(BASES[0]), sub_plan(BASES[0])], ids=["gate", "sub"])
def test_no_translation_is_global(plan: ContextPlan) -> None:
    """A global translation would outlive a change of CR3 (SDM vol. 3A, 4.10.2.4)."""
    complete(plan)
    words = [word for number in range(len(plan.guest)) for word in plan.guest.table(number)]
    assert any(words)
    assert not [hex(word) for word in words if word & 0x100]


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_i8_only_what_the_guest_can_write_is_a_user_page_of_a_supervisor(
    base: int, user: bool
) -> None:
    """Windows and shared memory are always user pages.

    The rest of a sub context is made of user pages only for callers in user mode.
    """
    plan = sub_plan(base, user=user)
    kinds = {
        (span.start - base, span.size): bool(span.access & Access.USER)
        for span in plan.guest.spans()
    }
    memory = (crossing.SHARED_OFFSET, LARGE)
    assert kinds.pop(memory) is True
    assert set(kinds.values()) == {user}
    assert sum(size for _, size in kinds) == (4 + 1 + 1 + 4) * PAGE_SIZE
    gate = plan_gate(0x7000_0000, base, user=user)
    assert {bool(span.access & Access.USER) for span in gate.guest.spans()} == {user}


@pytest.mark.parametrize("base", BASES)
def test_the_range_told_to_the_kernel_holds_all_that_is_mapped(base: int) -> None:
    for plan in (gate_plan(base), sub_plan(base)):
        spans = list(plan.guest.spans())
        low = min(span.start for span in spans)
        high = max(span.end for span in spans)
        assert (plan.gva, plan.size) == (low, high - low)


def test_the_list_is_writable_in_both_contexts_and_the_official_eptp_in_none() -> None:
    gate, sub = gate_plan(BASES[0]), sub_plan(BASES[0])
    for plan, gpa in (
        (gate, crossing.GATE_PRIVATE_GPA + crossing.GATE_LIST_OFFSET),
        (sub, crossing.SUB_PRIVATE_GPA + crossing.LIST_OFFSET),
    ):
        walked = plan.ept.walk(gpa)
        assert walked.access == Access.READ | Access.WRITE
        numbered = [page for page in plan.pages for _ in range(page.count)]
        assert isinstance(numbered[walked.page or 0], ListPage)
    data = gate.ept.walk(crossing.GATE_PRIVATE_GPA + crossing.GATE_DATA_OFFSET)
    assert data.access == Access.READ


def test_what_an_attachment_costs_is_what_the_documentation_says() -> None:
    """The documented cost: gate 9 + 5 + 3 pages; sub 7 + 4 + 10, whatever the memory's size."""
    gate, _ = complete(gate_plan(BASES[0]))
    assert (gate.cost.ept_tables, gate.cost.guest_tables, gate.cost.mapped) == (9, 5, 3)
    sub, _ = complete(sub_plan(BASES[0]))
    assert (sub.cost.ept_tables, sub.cost.guest_tables, sub.cost.mapped) == (7, 4, 10)


@pytest.mark.parametrize("size", [PAGE_SIZE, GIB, GIB + PAGE_SIZE, crossing.MAX_MEMORY])
def test_memory_is_mapped_by_parts(size: int) -> None:
    plan, _ = complete(sub_plan(BASES[0], memory=size))
    assert plan.parts == -(-size // GIB)
    for part in range(plan.parts):
        found = plan.ept.walk(crossing.SUB_MEMORY_GPA + part * GIB)
        assert found.target == (part + 1) * GIB
        assert found.access == Access.READ | Access.WRITE
    # A GiB of memory may take another table for guest paging.
    assert 4 <= len(plan.guest) <= 5 + plan.parts
    end = BASES[0] + crossing.SHARED_OFFSET + size
    assert end <= plan.gva + plan.size < end + (2 << 20)


def test_memory_that_does_not_fit_behind_the_crossing_base_is_refused() -> None:
    sub_plan(BASES[2], memory=GIB)
    with pytest.raises(CrossingBaseError, match="use a lower crossing base"):
        sub_plan(BASES[2], memory=2 * GIB)


@pytest.mark.attack("T8")
@pytest.mark.parametrize(
    "base", [0, 0x1000, 4 << 30, crossing.CROSSING_GVA + 0x1000, 1 << 47, -1 << 30, 1 << 64]
)
def test_a_crossing_area_where_none_can_lie_is_refused(base: int) -> None:
    with pytest.raises(CrossingBaseError, match="use a canonical address"):
        plan_gate(0x1000, base)


def test_a_plan_prints_as_ranges() -> None:
    plan, _ = complete(gate_plan(BASES[0]))
    assert "GPA 0x5000001000-0x5000001fff -> page 0 [r-x WB]" in str(plan)
    assert EptEntry.SPACE == "GPA"
