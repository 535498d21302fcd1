"""The addresses keep the promises on which other parts rely."""

from itertools import pairwise

import pytest

from pykvm.elisa import crossing
from pykvm.machine.bare import layout
from pykvm.machine.x86 import kvm_pages

pytestmark = pytest.mark.unit


def _indexes(gva: int) -> list[int]:
    return [gva >> shift & 511 for shift in (39, 30, 21, 12)]


def test_crossing_base() -> None:
    assert crossing.CROSSING_GVA % crossing.CROSSING_ALIGN == 0
    assert crossing.CROSSING_MIN_GVA <= crossing.CROSSING_GVA < 1 << 47
    pml4, pdpt, pd, pt = _indexes(crossing.CROSSING_GVA)
    assert pt == 0
    assert len({pml4, pdpt, pd}) == 3
    # Crossing pages use PT indexes 0 to 0xf.
    assert min(pml4, pdpt, pd) > 0x0F


def test_crossing_area_has_no_overlaps() -> None:
    page = 0x1000
    places = [
        (crossing.ENTRY_OFFSET, page),
        (crossing.GATE_OFFSET, page),
        (crossing.SUB_ENTRY_OFFSET, page),
        (crossing.RETURN_OFFSET, page),
        (crossing.LIST_OFFSET, page),
        (crossing.ENV_OFFSET, page),
        (crossing.STACK_OFFSET, crossing.STACK_SIZE),
        (crossing.IMAGE_OFFSET, crossing.IMAGE_MAX_SIZE),
        (crossing.PRIVATE_TABLES_OFFSET, crossing.PRIVATE_TABLES_SIZE),
        (crossing.SHARED_OFFSET, crossing.CROSSING_ALIGN),
    ]
    for (start, size), (following, _) in pairwise(places):
        assert start % page == size % page == 0
        assert start + size <= following
    # The object's memory lies behind the rest of the sub context and before the gate context.
    assert crossing.SUB_PRIVATE_GPA + (1 << 30) <= crossing.SUB_MEMORY_GPA
    assert crossing.SUB_MEMORY_GPA + crossing.MAX_MEMORY <= crossing.GATE_PRIVATE_GPA - (1 << 30)
    # The three crossing pages and the return page are adjacent, in this order.
    assert [offset for offset, _ in places[:4]] == [0, page, 2 * page, 3 * page]
    # The pages before and after the stack are free, for overflow and underflow.
    taken = {start + at for start, size in places for at in range(0, size, page)}
    assert crossing.STACK_OFFSET - page not in taken
    assert crossing.STACK_OFFSET + crossing.STACK_SIZE not in taken


def test_gate_data_lies_clear_of_the_crossing_area() -> None:
    offsets = (crossing.GATE_LIST_OFFSET, crossing.GATE_DATA_OFFSET)
    for offset in offsets:
        assert offset % 0x1000 == 0
        assert offset + 0x1000 <= 0
        assert crossing.CROSSING_MIN_GVA + offset >= 4 << 30
    assert len(set(offsets)) == len(offsets)


def test_private_range() -> None:
    assert crossing.PRIVATE_GPA_FIRST == 256 << 30
    assert crossing.PRIVATE_GPA_END <= 1 << 39  # addressable by a client processor
    assert layout.RAM_LIMIT_GPA <= crossing.PRIVATE_GPA_FIRST
    for base in (crossing.SUB_PRIVATE_GPA, crossing.GATE_PRIVATE_GPA):
        assert crossing.PRIVATE_GPA_FIRST <= base < crossing.PRIVATE_GPA_END
        assert base % crossing.CROSSING_ALIGN == 0
    # 64 GiB for shared memory and windows are below the gate's pages.
    assert crossing.GATE_PRIVATE_GPA - crossing.SUB_PRIVATE_GPA == 64 << 30


def test_bare_guest_areas_follow_each_other() -> None:
    areas = [
        (layout.NULL_PAGE_GPA, 0x1000),
        (layout.PAGE_TABLES_GPA, layout.PAGE_TABLES_SIZE),
        (layout.GDT_GPA, 0x1000),
        (layout.IDT_GPA, 0x1000),
        (layout.TSS_GPA, 0x1000),
        (layout.BOOT_INFO_GPA, 0x1000),
        (layout.ENTRY_PAGE_GPA, 0x1000),
        (layout.RETURN_PAGE_GPA, 0x1000),
        (layout.STACK_GPA, layout.STACK_TOP_GPA - layout.STACK_GPA),
        (layout.IMAGE_GPA, layout.IMAGE_END_GPA - layout.IMAGE_GPA),
        (layout.CAPTURE_GPA, layout.CAPTURE_SIZE),
        (layout.RX_LOG_GPA, layout.RX_LOG_SIZE),
        (layout.SAMPLES_GPA, layout.SAMPLES_SIZE),
    ]
    for (start, size), (following, _) in pairwise(areas):
        assert start + size <= following
    assert layout.SAMPLES_GPA + layout.SAMPLES_SIZE <= layout.RAM_SIZE < kvm_pages.IDENTITY_MAP_GPA
    assert kvm_pages.KVM_TSS_GPA + 3 * 0x1000 <= layout.WINDOW_GPA
    assert layout.WINDOW_GPA < layout.DIRECT_GPA < layout.RAM_LIMIT_GPA
