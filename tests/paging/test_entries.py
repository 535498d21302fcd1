"""Entries and EPTPs return the fields put in, and refuse what the processor refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.paging.entries import (
    ADDRESS_MASK,
    EPTP,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    Access,
    Entry,
    EntryError,
    EptEntry,
    MemoryType,
    Word,
    X86Entry,
    page_size,
    size_name,
)

pytestmark = pytest.mark.unit

R, W, X, U = Access.READ, Access.WRITE, Access.EXECUTE, Access.USER

levels = st.integers(1, 3)
frames = st.integers(0, (1 << 40) - 1)
ept_access = st.sampled_from([R, R | W, R | X, R | W | X, X])


def _aligned(frame: int, level: int) -> int:
    return (frame << 12) & ~(page_size(level) - 1)


@given(levels, frames, ept_access, st.sampled_from(MemoryType))
def test_ept_leaf_round_trip(
    level: int, frame: int, access: Access, memory_type: MemoryType
) -> None:
    address = _aligned(frame, level)
    entry = EptEntry.leaf(level, address, access, memory_type)
    assert entry.present
    assert entry.is_leaf(level)
    assert entry.target(level) == address
    assert entry.access == access
    assert entry.memory_type_of(level) == memory_type
    assert entry.faults(level) == ()
    # Only requested bits are set: the kernel refuses any other.
    assert int(entry) == address | access | memory_type << 3 | (level > 1) << 7
    assert EptEntry(int(entry)) == entry


@given(
    levels,
    frames,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([MemoryType.WB, MemoryType.WT, MemoryType.UC]),
)
def test_x86_leaf_round_trip(
    level: int, frame: int, flags: tuple[bool, bool, bool], memory_type: MemoryType
) -> None:
    address = _aligned(frame, level)
    access = R
    for on, bit in zip(flags, (W, X, U), strict=True):
        access |= bit if on else Access.NONE
    entry = X86Entry.leaf(level, address, access, memory_type)
    assert entry.present
    assert entry.is_leaf(level)
    assert entry.target(level) == address
    assert entry.access == access
    assert entry.memory_type_of(level) == memory_type
    assert entry.faults(level) == ()
    # The processor has no bit left to write (I4).
    assert entry.accessed
    assert entry.dirty
    assert entry.no_execute == (not access & X)


@given(frames, ept_access)
def test_ept_table_round_trip(frame: int, access: Access) -> None:
    entry = EptEntry.table(frame << 12, access)
    assert int(entry) == frame << 12 | access
    for level in (2, 3, 4, 5):
        assert not entry.is_leaf(level)
        assert entry.faults(level) == ()


@given(frames, st.booleans(), st.booleans())
def test_x86_table_round_trip(frame: int, write: bool, user: bool) -> None:
    access = R | X | (W if write else Access.NONE) | (U if user else Access.NONE)
    entry = X86Entry.table(frame << 12, access)
    assert entry.address == frame << 12
    assert entry.access == access
    assert entry.accessed
    assert not entry.no_execute
    for level in (2, 3, 4, 5):
        assert not entry.is_leaf(level)
        assert entry.faults(level) == ()


@pytest.mark.parametrize("access", [W, W | X, Access.NONE, R | U, U])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_ept_refuses_access(level: int, access: Access) -> None:
    with pytest.raises(EntryError):
        EptEntry.leaf(level, 0, access)
    with pytest.raises(EntryError):
        EptEntry.table(0, access)


def test_ept_write_without_read_names_the_cause() -> None:
    with pytest.raises(EntryError, match="writable but not readable"):
        EptEntry.leaf(1, 0x1000, W)


@pytest.mark.parametrize("access", [Access.NONE, W, X, U, W | X | U])
def test_x86_refuses_access_without_read(access: Access) -> None:
    with pytest.raises(EntryError, match="add READ"):
        X86Entry.leaf(1, 0, access)
    with pytest.raises(EntryError, match="add READ"):
        X86Entry.table(0, access)


@pytest.mark.parametrize("kind", [EptEntry, X86Entry])
@pytest.mark.parametrize(
    ("level", "address"),
    [
        (1, 0x800),
        (1, 1 << 52),
        (2, SIZE_4K),
        (2, SIZE_2M // 2),
        (3, SIZE_2M),
        (3, SIZE_1G // 2),
        (4, 0),
        (0, 0),
    ],
)
def test_leaf_addresses_and_levels_refused(kind: type[Entry], level: int, address: int) -> None:
    with pytest.raises(EntryError):
        kind.leaf(level, address, R)


@pytest.mark.parametrize("kind", [EptEntry, X86Entry])
@pytest.mark.parametrize("address", [1, 0xFFF, 1 << 52, 1 << 63])
def test_table_addresses_refused(kind: type[Entry], address: int) -> None:
    with pytest.raises(EntryError):
        kind.table(address)


@pytest.mark.parametrize("memory_type", [MemoryType.WC, MemoryType.WP])
def test_x86_has_no_such_memory_type(memory_type: MemoryType) -> None:
    with pytest.raises(EntryError, match="use WB, WT or UC"):
        X86Entry.leaf(1, 0, R, memory_type)


# Reserved bits from the manual's tables: type, level, leaf or not, mask.
RESERVED = [
    (EptEntry, 5, False, 0xF8),
    (EptEntry, 4, False, 0xF8),
    (EptEntry, 3, False, 0x78),
    (EptEntry, 2, False, 0x78),
    (EptEntry, 3, True, 0x3FFFF000),
    (EptEntry, 2, True, 0x1FF000),
    (EptEntry, 1, True, 0),
    (X86Entry, 5, False, 0x80),
    (X86Entry, 4, False, 0x80),
    (X86Entry, 3, False, 0),
    (X86Entry, 2, False, 0),
    (X86Entry, 3, True, 0x3FFFE000),
    (X86Entry, 2, True, 0x1FE000),
    (X86Entry, 1, True, 0),
]


@pytest.mark.parametrize(("kind", "level", "leaf", "mask"), RESERVED)
def test_reserved_bits(kind: type[Entry], level: int, leaf: bool, mask: int) -> None:
    good = kind.leaf(level, 0, R) if leaf else kind.table(0)
    for bit in range(52):
        flipped = kind(good | 1 << bit)
        # Bit 7 makes another kind of entry; the low bits of EPT leaves are access and type.
        if flipped.is_leaf(level) != good.is_leaf(level) or flipped == good:
            continue
        refused = bool(flipped.faults(level))
        if kind is EptEntry and leaf and bit in (3, 4, 5):
            assert refused == (flipped.memory_type_of(level) is None)
        else:
            assert refused == bool(mask >> bit & 1), bit


@pytest.mark.parametrize("kind", [EptEntry, X86Entry])
def test_address_width(kind: type[Entry]) -> None:
    entry = kind.leaf(1, 1 << 39, R)
    assert entry.faults(1, physical_bits=40) == ()
    assert entry.faults(1, physical_bits=39) == ("address 0x8000000000 needs more than 39 bits",)


def test_absent() -> None:
    assert not EptEntry(0).present
    assert not EptEntry(ADDRESS_MASK | 0x38).present
    assert EptEntry(4).present  # execute-only
    assert not X86Entry(ADDRESS_MASK | 0xFFE).present
    assert not X86Entry(0xCCCCCCCCCCCCCCCC).present  # int3, with which code pages are filled


@pytest.mark.parametrize(
    ("entry", "level", "text"),
    [
        (EptEntry.leaf(1, 0x7000, R | X), 1, "0x7000 [r-x WB 4K]"),
        (EptEntry(EptEntry.leaf(1, 0x7000, R) | 0x40), 1, "0x7000 [r-- WB 4K IPAT]"),
        (EptEntry.leaf(2, 0x200000, R | W, MemoryType.UC), 2, "0x200000 [rw- UC 2M]"),
        (EptEntry.leaf(3, 0, X), 3, "0x0 [--x WB 1G]"),
        (EptEntry.table(0x3000), 4, "table 0x3000 [rwx]"),
        (EptEntry(0), 1, "absent"),
        (EptEntry(0x1038), 1, "absent (0x1038)"),
        (EptEntry(0x1002), 1, "invalid 0x1002: writable but not readable"),
        (EptEntry(0x1011), 1, "invalid 0x1011: memory type 2 is reserved"),
        (X86Entry.leaf(1, 0x5000, R | W | X | U), 1, "0x5000 [rwxu WB 4K]"),
        (X86Entry.leaf(2, 0x400000, R), 2, "0x400000 [r--s WB 2M]"),
        (X86Entry.table(0x9000), 2, "table 0x9000 [rwxu]"),
        (X86Entry(0x1087), 4, "invalid 0x1087: bit 7 is reserved"),
    ],
)
def test_decoding(entry: Entry, level: int, text: str) -> None:
    assert entry.decode(level) == text


def test_str_is_that_of_a_page_entry() -> None:
    assert str(EptEntry.leaf(1, 0x7000, R | X)) == "0x7000 [r-x WB 4K]"
    assert f"{EptEntry(0x7035)}" == "0x7000 [r-x WB 4K]"
    assert f"{EptEntry(0x7035):#x}" == "0x7035"
    assert repr(EptEntry(0x7035)) == "EptEntry(0x7035)"


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_words_have_64_bits(value: int) -> None:
    with pytest.raises(EntryError, match="64-bit"):
        Word(value)


@given(frames, st.sampled_from([4, 5]), st.booleans())
def test_eptp_round_trip(frame: int, depth: int, flags: bool) -> None:
    eptp = EPTP.of(frame << 12, depth, access_dirty=flags)
    assert eptp.address == frame << 12
    assert eptp.levels == depth
    assert eptp.memory_type == MemoryType.WB
    assert eptp.access_dirty == flags
    assert eptp.faults() == ()
    # Read as a page-table entry, such an EPTP is absent: a list page leads nowhere.
    assert not X86Entry(eptp).present


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "EPTP none"),
        (0x1234501E, "EPTP 0x12345000 [4 levels WB]"),
        (0x12345066, "EPTP 0x12345000 [5 levels WB A/D]"),
        (0x1001F, "EPTP invalid 0x1001f: memory type 7 is reserved"),
        (0x1000E, "EPTP invalid 0x1000e: 2 levels"),
        (0x1011E, "EPTP invalid 0x1011e: reserved bits are set"),
        (1 << 52 | 0x1E, "EPTP invalid 0x1000000000001e: reserved bits are set"),
    ],
)
def test_eptp_decoding(value: int, text: str) -> None:
    assert str(EPTP(value)) == text


def test_eptp_refused() -> None:
    for address, depth in ((1, 4), (1 << 52, 4), (0, 3), (0, 6)):
        with pytest.raises(EntryError):
            EPTP.of(address, depth)
    assert EPTP(1 << 40 | 0x1E).faults(39) == ("address 0x10000000000 needs more than 39 bits",)


def test_sizes() -> None:
    assert [page_size(level) for level in (1, 2, 3)] == [SIZE_4K, SIZE_2M, SIZE_1G]
    assert [size_name(size) for size in (SIZE_4K, SIZE_2M, SIZE_1G, 100)] == [
        "4K",
        "2M",
        "1G",
        "100",
    ]
