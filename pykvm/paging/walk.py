"""The software walker: reads page tables back as the processor does.

It does not depend on the builder. A *read function*, ``read(address) -> Sequence[int]``, returns
the 512 words of the table at an address. For tables that are passed to the kernel, addresses are
table numbers times 4096; for tables in guest memory they are GPAs::

    read = lambda gpa: memory.view(gpa, 4096).cast("Q")
    print(walk(0x1000, gva, X86Entry, read))    # GVA 0x100000 -> GPA 0x100000 [rwxs WB 2M]

`walk_nested` combines guest tables and an EPT, from GVA to GPA to page. It finds every table of the
guest through the EPT, as described in SDM vol. 3C 29.3.1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pykvm.paging.entries import (
    ADDRESS_MASK,
    ENTRIES,
    Access,
    Entry,
    MemoryType,
    X86Entry,
    page_size,
    size_name,
)
from pykvm.sizes import PAGE_SIZE

__all__ = ["NestedWalk", "ReadTable", "Span", "Step", "Walk", "spans", "walk", "walk_nested"]

ReadTable = Callable[[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Step:
    """One level of a walk.

    Attributes:
        level: level of the table; 1 is the lowest.
        table: address of the table.
        index: index of the entry.
        entry: the entry that the walk read.
    """

    level: int
    table: int
    index: int
    entry: Entry

    def __str__(self) -> str:
        return f"level {self.level} table {self.table:#x}[{self.index:#x}]: " + self.entry.decode(
            self.level
        )


@dataclass(frozen=True, slots=True)
class Walk:
    """Translation of one address.

    Attributes:
        entry: type of the entries.
        address: the address that was translated.
        steps: the levels that the walk read, from the root down.
        target: where the byte at `address` lies, or None if nothing is mapped. Where the tables
            hold indices: the page's number times 4096 plus the offset.
        access: what every level allows.
        memory_type: memory type of the leaf.
        size: bytes that the leaf maps.
        indexed: whether the tables hold indices.
        fault: why nothing is mapped; empty if something is.
    """

    entry: type[Entry]
    address: int
    steps: tuple[Step, ...]
    target: int | None = None
    access: Access = Access.NONE
    memory_type: MemoryType | None = None
    size: int = 0
    indexed: bool = False
    fault: str = ""

    @property
    def mapped(self) -> bool:
        return self.target is not None

    @property
    def page(self) -> int | None:
        """Number of the 4 KiB page that holds the byte."""
        return None if self.target is None else self.target >> 12

    def __str__(self) -> str:
        start = f"{self.entry.SPACE} {self.address:#x} -> "
        if self.target is None:
            return f"{start}nothing: {self.fault}"
        kind = self.memory_type.name if self.memory_type is not None else "?"
        flags = f"[{self.entry.access_name(self.access)} {kind} {size_name(self.size)}]"
        if not self.indexed:
            return f"{start}{self.entry.TARGET} {self.target:#x} {flags}"
        offset = self.target & (PAGE_SIZE - 1)
        return f"{start}page {self.page}{f'+{offset:#x}' * bool(offset)} {flags}"


def walk(
    root: int,
    address: int,
    entry: type[Entry],
    read: ReadTable,
    *,
    levels: int = 4,
    indexed: bool = False,
    physical_bits: int = 52,
) -> Walk:
    """Translate one address with the tables whose root lies at `root`.

    An absent or invalid entry raises no exception. The `Walk` is not mapped then and says why.

    Args:
        root: address of the root table; only bits 12 to 51 count.
        address: the address to translate.
        entry: type of the entries.
        read: function that returns the 512 words of the table at an address.
        levels: 4 or 5.
        indexed: whether the tables hold indices.
        physical_bits: the processor's physical address width; with 52 no address is refused.
    """
    steps: list[Step] = []
    fault = _width_fault(address, entry, levels)
    access = entry.TABLE_ACCESS
    table = root & ADDRESS_MASK
    for level in range(levels, 0, -1):
        if fault:
            break
        index = address >> (3 + 9 * level) & (ENTRIES - 1)
        here = entry(read(table)[index])
        steps.append(Step(level, table, index, here))
        if not here.present:
            fault = f"entry {index:#x} at level {level} is absent"
            break
        faults = here.faults(level, physical_bits)
        if faults:
            fault = f"entry {index:#x} at level {level} is invalid ({', '.join(faults)})"
            break
        access &= here.access
        if here.is_leaf(level):
            size = page_size(level)
            return Walk(
                entry,
                address,
                tuple(steps),
                here.target(level) | address & (size - 1),
                access,
                here.memory_type_of(level),
                size,
                indexed,
            )
        table = here.address
    return Walk(entry, address, tuple(steps), indexed=indexed, fault=fault)


def _width_fault(address: int, entry: type[Entry], levels: int) -> str:
    bits = 12 + 9 * levels
    if entry is X86Entry:
        high = address >> (bits - 1)
        if high not in (0, (1 << (65 - bits)) - 1):
            return f"not canonical with {levels} levels"
        return ""
    return f"needs more than {bits} bits" if address >> bits else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of addresses that the tables map alike.

    Attributes:
        start: first address.
        size: bytes.
        target: what the first address translates to.
        access: what every level allows.
        memory_type: memory type of the leaves.
        repeats: whether every 4 KiB of the range map to the same page (the Anywhere Page Table),
            and not to one page after the other.
    """

    start: int
    size: int
    target: int
    access: Access
    memory_type: MemoryType | None
    repeats: bool = False

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.start + self.size


@dataclass(slots=True)
class _Spanner:
    """State of one enumeration; `uniform` caches which tables lead to one page everywhere."""

    entry: type[Entry]
    read: ReadTable
    uniform: dict[tuple[int, int], tuple[Entry, Access] | None] = field(default_factory=dict)

    def uniform_leaf(self, table: int, level: int) -> tuple[Entry, Access] | None:
        """Return the 4 KiB leaf to which every address of this table leads, if there is one."""
        key = (table, level)
        if key not in self.uniform:
            words = self.read(table)
            first = self.entry(words[0])
            found: tuple[Entry, Access] | None = None
            if first.present and not first.faults(level) and all(w == first for w in words):
                if level == 1:
                    found = first, first.access
                elif not first.is_leaf(level):
                    below = self.uniform_leaf(first.address, level - 1)
                    found = below and (below[0], below[1] & first.access)
            self.uniform[key] = found
        return self.uniform[key]

    def visit(
        self, table: int, level: int, base: int, wanted: range, access: Access
    ) -> Iterator[Span]:
        size = page_size(level)
        words = self.read(table)
        for index in range((wanted.start - base) // size, (wanted.stop - 1 - base) // size + 1):
            if not words[index]:
                continue
            here = self.entry(words[index])
            if not here.present or here.faults(level):
                continue
            at = base + index * size
            low, high = max(wanted.start, at), min(wanted.stop, at + size)
            both = access & here.access
            if here.is_leaf(level):
                target = here.target(level) + low - at
                yield Span(low, high - low, target, both, here.memory_type_of(level))
                continue
            uniform = self.uniform_leaf(here.address, level - 1)
            if uniform:
                leaf, below = uniform
                kind = leaf.memory_type_of(1)
                yield Span(low, high - low, leaf.target(1), both & below, kind, True)
            else:
                yield from self.visit(here.address, level - 1, at, range(low, high), both)


def spans(
    root: int, start: int, size: int, entry: type[Entry], read: ReadTable, *, levels: int = 4
) -> Iterator[Span]:
    """Yield the mapped ranges of an address range; neighbours that are mapped alike are joined.

    An Anywhere Page Table, which fills terabytes, takes no longer, because tables that repeat one
    page are recognised.

    Args:
        root: address of the root table.
        start: first address. Addresses are not sign-extended: they go from 0 to
            2^(12 + 9 * levels).
        size: bytes of the address range.
        entry: type of the entries.
        read: function that returns the 512 words of the table at an address.
        levels: 4 or 5.
    """
    wanted = range(start, min(start + size, 1 << (12 + 9 * levels)))
    last: Span | None = None
    found = _Spanner(entry, read).visit(root, levels, 0, wanted, entry.TABLE_ACCESS)
    for span in found if wanted else ():
        joined = _join(last, span) if last else None
        if last and not joined:
            yield last
        last = joined or span
    if last:
        yield last


def _join(first: Span, second: Span) -> Span | None:
    if first.end != second.start or (first.access, first.memory_type) != (
        second.access,
        second.memory_type,
    ):
        return None
    size = first.size + second.size
    if first.target == second.target and all(
        span.repeats or span.size == PAGE_SIZE for span in (first, second)
    ):
        return Span(first.start, size, first.target, first.access, first.memory_type, True)
    if not first.repeats and not second.repeats and first.target + first.size == second.target:
        return Span(first.start, size, first.target, first.access, first.memory_type)
    return None


@dataclass(frozen=True, slots=True)
class NestedWalk:
    """Translation of a GVA to a GPA and to a page.

    Attributes:
        gva: the address that was translated.
        guest: the walk of the guest's tables, or None if the EPT hides one of them.
        page: the EPT walk of the final GPA, or of the guest table that could not be read.
        access: what both allow.
        fault: why nothing is mapped; empty if something is.
    """

    gva: int
    guest: Walk | None
    page: Walk | None
    access: Access = Access.NONE
    fault: str = ""

    @property
    def mapped(self) -> bool:
        return not self.fault

    @property
    def target(self) -> int | None:
        """Address of the byte according to the EPT, or None if it cannot be reached."""
        return None if self.fault or self.page is None else self.page.target

    def __str__(self) -> str:
        if self.fault or self.guest is None or self.page is None:
            return f"GVA {self.gva:#x} -> nothing: {self.fault}"
        return f"{self.guest}, {self.page}"


class _TableOutOfReachError(Exception):
    def __init__(self, page: Walk, fault: str) -> None:
        super().__init__(fault)
        self.page = page


def walk_nested(
    gva: int,
    cr3: int,
    ept_walk: Callable[[int], Walk],
    read_page: ReadTable,
    *,
    levels: int = 4,
    physical_bits: int = 52,
) -> NestedWalk:
    """Translate a GVA with the guest tables at GPA `cr3`, which are all found through an EPT.

    Args:
        gva: the address to translate.
        cr3: the guest's CR3; only bits 12 to 51 count.
        ept_walk: function that translates a GPA, such as `PageTables.walk`.
        read_page: function that returns the 512 words of a page, given the target of an EPT walk.
        levels: levels of the guest's paging, 4 or 5.
        physical_bits: the processor's physical address width; with 52 no address is refused.
    """

    def read_guest_table(gpa: int) -> Sequence[int]:
        found = ept_walk(gpa)
        if found.target is None:
            raise _TableOutOfReachError(found, f"guest table at {found}")
        if not found.access & Access.READ:
            raise _TableOutOfReachError(found, f"guest table may not be read: {found}")
        return read_page(found.target)

    try:
        guest = walk(
            cr3, gva, X86Entry, read_guest_table, levels=levels, physical_bits=physical_bits
        )
    except _TableOutOfReachError as stop:
        return NestedWalk(gva, None, stop.page, fault=str(stop))
    if guest.target is None:
        return NestedWalk(gva, guest, None, fault=guest.fault)
    page = ept_walk(guest.target)
    if page.target is None:
        return NestedWalk(gva, guest, page, fault=str(page))
    # USER is in the guest's entries alone; everything else has to be allowed by both.
    access = guest.access & (page.access | Access.USER)
    return NestedWalk(gva, guest, page, access)
