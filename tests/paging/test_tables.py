"""Random mappings, built, read back with the walker, and compared with a model of their own."""

import random
import sys
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from operator import attrgetter
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm.paging.anywhere_page_table import fill_anywhere
from pykvm.paging.entries import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    Access,
    Entry,
    EntryError,
    EptEntry,
    MemoryType,
    X86Entry,
)
from pykvm.paging.tables import (
    AddressRangeError,
    AlignmentError,
    AlreadyMappedError,
    PageTables,
    TableAddresses,
    TableLimitError,
    TableNumbers,
)
from pykvm.sizes import PAGE_SIZE

pytestmark = pytest.mark.unit

R, W, X, U = Access.READ, Access.WRITE, Access.EXECUTE, Access.USER
ROOM = TableAddresses(0x40_0010_0000, 64 << 20)

# Addresses at table boundaries of every level, and the ends of the address space.
LANDMARKS = [0, SIZE_2M, SIZE_1G, 1 << 39, 0x40_0000_0000, (1 << 39) * 3, 1 << 47]


@dataclass(frozen=True)
class Request:
    start: int
    target: int
    size: int
    access: Access
    max_page: int


@dataclass(frozen=True)
class Leaf:
    start: int
    size: int
    target: int
    access: Access

    @property
    def end(self) -> int:
        return self.start + self.size


@st.composite
def requests(draw: st.DrawFn, kind: type[Entry], levels: int) -> Request:
    max_page = draw(st.sampled_from([SIZE_4K, SIZE_2M, SIZE_1G]))
    unit = draw(st.sampled_from([u for u in (SIZE_4K, SIZE_2M, SIZE_1G) if u <= max_page]))
    width = 12 + 9 * levels
    landmarks = [*LANDMARKS, (1 << width) - SIZE_1G, 1 << (width - 1)]
    near = draw(st.sampled_from([mark for mark in landmarks if mark < 1 << width]))
    start = near + unit * draw(st.integers(-3, 8))
    count = draw(st.integers(1, 600) if unit == SIZE_4K else st.integers(1, 4))
    size = unit * count
    # Up to two small pages more, so that large pages have small ones beside them.
    if max_page > SIZE_4K:
        start -= SIZE_4K * draw(st.integers(0, 2))
        size += SIZE_4K * draw(st.integers(0, 2))
    start = min(max(start, 0), (1 << width) - SIZE_4K)
    size = min(size, (1 << width) - start)
    if kind is X86Entry:
        half = 1 << (width - 1)
        if start < half < start + size:
            size = half - start
        if start >= half:
            start += (1 << 64) - (1 << width)
    # Mostly congruent targets, as large pages need them; sometimes not.
    target = (start & (SIZE_1G - 1)) + SIZE_1G * draw(st.integers(0, 1 << 10))
    if unit == SIZE_4K and draw(st.integers(0, 4)) == 0:
        target += SIZE_4K
    if kind is X86Entry:
        access = R | draw(st.sampled_from([Access.NONE, W])) | draw(st.sampled_from([X, X | U]))
    else:
        access = draw(st.sampled_from([R, R | W, R | X, X]))
    return Request(start, target, size, access, max_page)


@dataclass
class Model:
    """The mappings as plain ranges: no tables, no indexes."""

    levels: int
    leaves: list[Leaf] = field(default_factory=list)  # in order
    requests: list[Request] = field(default_factory=list)

    def overlaps(self, request: Request) -> bool:
        return any(
            other.start < request.start + request.size and request.start < other.start + other.size
            for other in self.requests
        )

    def add(self, request: Request) -> None:
        at, target, left = request.start, request.target, request.size
        while left:
            size = next(
                size
                for size in (SIZE_1G, SIZE_2M, SIZE_4K)
                if size <= min(request.max_page, left) and at % size == 0 and target % size == 0
            )
            self.leaves.append(Leaf(at, size, target, request.access))
            at, target, left = at + size, target + size, left - size
        self.requests.append(request)
        self.leaves.sort(key=attrgetter("start"))

    def find(self, address: int) -> Leaf | None:
        at = bisect_right(self.leaves, address, key=attrgetter("start"))
        return self.leaves[at - 1] if at and address < self.leaves[at - 1].end else None

    def table_blocks(self) -> set[tuple[int, int]]:
        """Return (level, number of the aligned block) of each table, by the documented rule."""
        low = (1 << (12 + 9 * self.levels)) - 1
        blocks = {(self.levels, 0)}
        for leaf in self.leaves:
            for level in range(1, self.levels):
                span = 1 << (12 + 9 * level)
                if leaf.size < span:
                    blocks.add((level, (leaf.start & low) // span))
        return blocks

    def excluded_blocks(self, bounds: tuple[int, int]) -> set[tuple[int, int]]:
        """Return the blocks that the bounds of an excluded range add."""
        blocks = set()
        for bound in bounds if bounds[0] < bounds[1] else ():
            leaf = self.find(bound)
            for level in range(1, self.levels):
                span = 1 << (12 + 9 * level)
                if bound % span and not (leaf and leaf.size >= span):
                    blocks.add((level, bound // span))
        return blocks

    def places(self, rng: random.Random) -> list[int]:
        """Return first and last bytes of leaves, and bytes inside and beside them.

        All requests are represented.
        """
        found = []
        leaves = {self.find(request.start) for request in self.requests}
        leaves |= {self.find(request.start + request.size - 1) for request in self.requests}
        leaves |= set(rng.sample(self.leaves, min(40, len(self.leaves))))
        for leaf in leaves:
            assert leaf is not None
            found += [leaf.start, leaf.end - 1, leaf.start + rng.randrange(leaf.size)]
            found += [leaf.start - 1, leaf.end]
        return found


CASES = st.sampled_from([(EptEntry, 4), (EptEntry, 5), (X86Entry, 4), (X86Entry, 5)])


def _build(data: st.DataObject, kind: type[Entry], levels: int) -> tuple[PageTables[Any], Model]:
    tables = PageTables(kind, ROOM, levels=levels)
    model = Model(levels)
    for request in data.draw(st.lists(requests(kind, levels), max_size=6)):
        before = tables.tobytes()
        arguments = (request.start, request.target, request.size, request.access)
        if model.overlaps(request):
            with pytest.raises(AlreadyMappedError):
                tables.map(*arguments, max_page=request.max_page)
            assert tables.tobytes() == before
        else:
            tables.map(*arguments, max_page=request.max_page)
            model.add(request)
    return tables, model


def _check_mapped(tables: PageTables[Any], model: Model, address: int) -> bool:
    """Check an address if it is mapped; return whether it is."""
    leaf, found = model.find(address), tables.walk(address)
    if leaf is None:
        return False
    assert found.target == leaf.target + address - leaf.start
    assert found.access == leaf.access
    assert found.size == leaf.size
    assert found.memory_type == MemoryType.WB
    assert [step.level for step in found.steps] == list(
        range(model.levels, model.levels - len(found.steps), -1)
    )
    assert found.steps[-1].level == {SIZE_4K: 1, SIZE_2M: 2, SIZE_1G: 3}[leaf.size]
    return True


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(CASES, st.data())
def test_walker_returns_what_was_mapped(case: tuple[type[Entry], int], data: st.DataObject) -> None:
    kind, levels = case
    tables, model = _build(data, kind, levels)
    assert len(tables) == len(model.table_blocks())
    assert len(tables.tobytes()) == len(tables) * PAGE_SIZE
    rng = random.Random(len(model.leaves))
    places = model.places(rng) + [rng.randrange(1 << (11 + 9 * levels)) for _ in range(50)]
    for address in places:
        if not _check_mapped(tables, model, address):
            found = tables.walk(address)
            assert not found.mapped
            assert found.fault
    # Enumeration from the tables alone gives the same bytes and no more.
    spans = list(tables.spans())
    assert sum(span.size for span in spans) == sum(leaf.size for leaf in model.leaves)
    for span in spans:
        for address in (span.start, span.end - 1):
            leaf = model.find(address)
            assert leaf is not None
            if not span.repeats:
                assert span.target + address - span.start == leaf.target + address - leaf.start


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([4, 5]), st.booleans(), st.data())
def test_everything_else_leads_to_the_apt_root(
    levels: int, excluding: bool, data: st.DataObject
) -> None:
    tables, model = _build(data, EptEntry, levels)
    limit = 1 << (12 + 9 * levels)
    bounds = (0, 0)
    if excluding:
        pick = st.sampled_from([mark for mark in LANDMARKS if mark < limit])
        near = st.builds(
            lambda mark, step, unit: min(max(mark + step * unit, 0), limit),
            pick,
            st.integers(-3, 3),
            st.sampled_from([SIZE_4K, SIZE_2M, SIZE_1G]),
        )
        low, high = sorted((data.draw(near), data.draw(near)))
        bounds = (low, high)
    root = 0x123_4567_8000
    blocks = model.table_blocks()
    fill_anywhere(tables, root, exclude=bounds)

    assert len(tables) == len(blocks | model.excluded_blocks(bounds)) + levels - 1
    rng = random.Random(len(model.leaves))
    places = model.places(rng) + [rng.randrange(limit) for _ in range(50)]
    places += [bound + step for bound in bounds for step in (-PAGE_SIZE, -1, 0, 1, PAGE_SIZE)]
    places += [0, limit - 1]
    if bounds[0] < bounds[1]:
        places += [rng.randrange(*bounds) for _ in range(20)]
    for address in places:
        if not 0 <= address < limit or _check_mapped(tables, model, address):
            continue
        found = tables.walk(address)
        if bounds[0] <= address < bounds[1]:
            assert not found.mapped, found
        else:
            assert found.target == root + address % PAGE_SIZE
            assert found.access == R
            assert found.size == SIZE_4K
    # No address maps to the root page any more.
    for address in places:
        page = address & ~(PAGE_SIZE - 1)
        if 0 <= address < limit and not bounds[0] <= address < bounds[1]:
            with pytest.raises(AlreadyMappedError):
                tables.map(page, 0, PAGE_SIZE, R)
    # No entry that the kernel would refuse, and none empty outside the excluded range.
    if bounds[0] == bounds[1]:
        assert all(0 not in tables.table(number) for number in range(len(tables)))
    assert sum(span.size for span in tables.spans()) == limit - (bounds[1] - bounds[0]) + sum(
        max(0, min(leaf.end, bounds[1]) - max(leaf.start, bounds[0])) for leaf in model.leaves
    )


@settings(max_examples=100)
@given(
    st.sampled_from([4, 5]),
    st.integers(0, (1 << 36) - 1),
    st.integers(1, 20000),
)
def test_number_of_tables_of_one_range(levels: int, page: int, count: int) -> None:
    """The number follows the closed formula in the module's docstring."""
    start, end = page * PAGE_SIZE, (page + count) * PAGE_SIZE
    if end > 1 << 48:
        return
    tables = PageTables(EptEntry, TableNumbers(), levels=levels)
    tables.map_pages(start, 0, count, R)
    expected = 1
    for level in range(1, levels):
        span = 1 << (12 + 9 * level)
        expected += (end - 1) // span - start // span + 1
    assert len(tables) == expected
    fill_anywhere(tables, 0)
    assert len(tables) == expected + levels - 1


def test_pages_by_number() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    ept.map_pages(0x40_0000_1000, 7, 1, R | X)
    assert str(ept.walk(0x40_0000_1000)) == "GPA 0x4000001000 -> page 7 [r-x WB 4K]"
    assert str(ept.walk(0x40_0000_1008)) == "GPA 0x4000001008 -> page 7+0x8 [r-x WB 4K]"
    assert str(ept.walk(0x40_0000_2000)) == (
        "GPA 0x4000002000 -> nothing: entry 0x2 at level 1 is absent"
    )
    # The form of kvm_elisa.h: table numbers above level 1, page numbers at level 1.
    words = array("Q", ept.tobytes())
    assert [(at, word) for at, word in enumerate(words) if word] == [
        (0, 1 << 12 | 7),
        (512 + 256, 2 << 12 | 7),
        (1024 + 0, 3 << 12 | 7),
        (1536 + 1, 7 << 12 | 6 << 3 | 5),
    ]


def test_tables_at_addresses() -> None:
    memory: dict[int, bytes] = {}
    guest = PageTables(X86Entry, TableAddresses(0x10000, 0x8000))
    guest.map(0x20_0000, 0x40_0000, SIZE_2M, R | W | X, max_page=SIZE_2M)
    guest.map(0xFFFF_FFFF_FFFF_F000, 0x3000, SIZE_4K, R | X | U)
    guest.store(memory.__setitem__)
    assert sorted(memory) == [0x10000 + n * PAGE_SIZE for n in range(len(guest))]
    assert guest.root == 0x10000
    first = array("Q", memory[0x10000])
    assert first[0] == 0x11000 | 0x27
    assert first[511] >> 12 in range(0x11, 0x18)
    assert str(guest.walk(0x20_0123)) == "GVA 0x200123 -> GPA 0x400123 [rwxs WB 2M]"
    assert str(guest.walk(0xFFFF_FFFF_FFFF_F000)) == (
        "GVA 0xfffffffffffff000 -> GPA 0x3000 [r-xu WB 4K]"
    )
    assert guest.walk(0x8000_0000_0000).fault == "not canonical with 4 levels"
    assert str(guest) == (
        "GVA 0x200000-0x3fffff -> GPA 0x400000 on [rwxs WB]\n"
        "GVA 0xfffffffffffff000-0xffffffffffffffff -> GPA 0x3000 [r-xu WB]"
    )


def test_large_pages_need_start_and_target_to_agree() -> None:
    guest = PageTables(X86Entry, ROOM)
    size = 2 * SIZE_1G
    guest.map(0, SIZE_2M, size, R | X, max_page=SIZE_1G)
    assert guest.walk(SIZE_1G).size == SIZE_2M
    assert guest.walk(SIZE_1G).target == SIZE_1G + SIZE_2M
    guest.map(4 * SIZE_1G, SIZE_4K, 2 * SIZE_2M, R | X, max_page=SIZE_1G)
    assert guest.walk(4 * SIZE_1G + SIZE_2M).size == SIZE_4K
    assert guest.walk(4 * SIZE_1G + SIZE_2M).target == SIZE_2M + SIZE_4K
    guest.map(8 * SIZE_1G, SIZE_1G, size, R | X, max_page=SIZE_1G)
    assert guest.walk(9 * SIZE_1G).size == SIZE_1G


def test_entries_above_the_leaves_may_be_restricted() -> None:
    guest = PageTables(X86Entry, ROOM, table_access=R | X)
    guest.map(0, 0, PAGE_SIZE, R | W | X | U)
    assert guest.walk(0).access == R | X


def _unchanged(tables: PageTables[Any], before: bytes) -> None:
    assert tables.tobytes() == before


@pytest.mark.parametrize(
    ("start", "target", "size", "error"),
    [
        (0x800, 0, PAGE_SIZE, AlignmentError),
        (0, 0x800, PAGE_SIZE, AlignmentError),
        (0, 0, 0x800, AlignmentError),
        (1 << 48, 0, PAGE_SIZE, AddressRangeError),
        ((1 << 48) - PAGE_SIZE, 0, 2 * PAGE_SIZE, AddressRangeError),
        (-PAGE_SIZE, 0, PAGE_SIZE, AddressRangeError),
        (0, 0, -PAGE_SIZE, AddressRangeError),
        (0, 1 << 52, PAGE_SIZE, AddressRangeError),
        (0, -PAGE_SIZE, PAGE_SIZE, AddressRangeError),
        (0, (1 << 52) - PAGE_SIZE, 2 * PAGE_SIZE, AddressRangeError),
    ],
)
def test_bad_ranges(start: int, target: int, size: int, error: type[Exception]) -> None:
    ept = PageTables(EptEntry, TableNumbers())
    before = ept.tobytes()
    with pytest.raises(error) as caught:
        ept.map(start, target, size, R)
    assert "\n" not in str(caught.value)
    _unchanged(ept, before)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (1 << 47, PAGE_SIZE),
        ((1 << 47) - PAGE_SIZE, 2 * PAGE_SIZE),
        ((1 << 64) - (1 << 47) - PAGE_SIZE, PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
)
def test_not_canonical(start: int, size: int) -> None:
    guest = PageTables(X86Entry, ROOM)
    with pytest.raises(AddressRangeError, match="not canonical with 4 levels"):
        guest.map(start, 0, size, R | X)
    if start == 1 << 47:
        PageTables(X86Entry, ROOM, levels=5).map(start, 0, size, R | X)


def test_bad_access_and_page_size_change_nothing() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    before = ept.tobytes()
    with pytest.raises(EntryError, match="writable but not readable"):
        ept.map_pages(0, 0, 1, W)
    with pytest.raises(AlignmentError):
        ept.map(0, 0, PAGE_SIZE, R, max_page=8192)
    with pytest.raises(AddressRangeError):
        PageTables(EptEntry, TableNumbers(), levels=3)
    _unchanged(ept, before)


def test_out_of_tables_changes_nothing() -> None:
    ept = PageTables(EptEntry, TableNumbers(limit=5))
    ept.map_pages(0, 0, 1, R)
    before = ept.tobytes()
    with pytest.raises(TableLimitError, match="more than 5 tables"):
        ept.map_pages(SIZE_2M, 1, 2 * 512, R)  # one table fits, two do not
    _unchanged(ept, before)
    ept.map_pages(SIZE_2M, 1, 512, R)
    assert len(ept) == 5
    with pytest.raises(TableLimitError, match="give them more room"):
        PageTables(X86Entry, TableAddresses(0x1000, 0x3000)).map(0, 0, PAGE_SIZE, R | X)
    with pytest.raises(AlignmentError):
        TableAddresses(0x800, 0x1000)


def test_nothing_is_mapped_by_size_zero() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    ept.map_pages(0x1000, 0, 0, R)
    assert len(ept) == 1
    assert list(ept.spans()) == []


def test_memory_types() -> None:
    ept = PageTables(EptEntry, TableNumbers())
    ept.map(0, 0, PAGE_SIZE, R, memory_type=MemoryType.UC)
    assert ept.walk(0).memory_type == MemoryType.UC


def test_large_ranges_cost_no_python_per_page() -> None:
    """There are fewer bytecodes than a loop over the pages would take.

    The test maps a 64 MiB window in 4 KiB pages, and fills all the rest. Emulated hosts build
    contexts too.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return count

    ept = PageTables(EptEntry, TableNumbers())
    before = sys.gettrace()
    sys.settrace(count)
    try:
        ept.map_pages(0x40_0020_0000, 0, 16384, R | W)
    finally:
        sys.settrace(before)
    assert 0 < steps < 2 * 16384
    assert len(ept) == 1 + 1 + 1 + 32
    mapping, steps = steps, 0
    sys.settrace(count)
    try:
        fill_anywhere(ept, 0)
    finally:
        sys.settrace(before)
    assert mapping > 0
    assert 0 < steps < 2 * 16384
