"""The software walker: reads page tables back the way the processor does.

It knows nothing of who built them: a *read function* gives the 512 words of the table at an
address, `read(table_address) -> Sequence[int]`. For tables that the kernel gets, addresses are
table numbers times 4096; for tables in guest memory they are GPAs::

    read = lambda gpa: memory.view(gpa, 4096).cast("Q")
    print(walk(0x1000, gva, X86Entry, read))    # GVA 0x100000 -> GPA 0x100000 [rwxs WB 2M]

`walk_nested` combines guest tables and an EPT: GVA to GPA to page, with every table of the guest
found through the EPT, as in SDM vol. 3C 29.3.1.
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
    """One level of a walk: the entry at an index of the table at an address."""

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
    """What became of one address.

    target: where the byte at `address` lies (index times 4096 plus offset, where the tables hold
        indices); None if nothing is mapped.
    access: what every level allows. size: bytes of the leaf. fault: why nothing is mapped.
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

    Never raises for what the tables hold: an absent or invalid entry ends in a Walk that is not
    `mapped` and says why.
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
    """Neighbouring addresses that the tables map alike.

    target: of the first byte. repeats: every 4 KiB of the range map to that same page (the
    Anywhere Page Table), instead of to one page after the other.
    """

    start: int
    size: int
    target: int
    access: Access
    memory_type: MemoryType | None
    repeats: bool = False

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(slots=True)
class _Spanner:
    """State of one enumeration; `uniform` remembers tables that hold one page 512 times."""

    entry: type[Entry]
    read: ReadTable
    uniform: dict[tuple[int, int], tuple[Entry, Access] | None] = field(default_factory=dict)

    def uniform_leaf(self, table: int, level: int) -> tuple[Entry, Access] | None:
        """The 4 KiB leaf to which every address of this table leads, if there is just one."""
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
    """All that is mapped in a range, joined where it goes on alike, in order.

    Fast where an Anywhere Page Table fills terabytes: tables that repeat one page are recognised.
    Addresses are without sign extension: 0 to 2^(12 + 9 * levels).
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
    """GVA to GPA to page.

    guest: the walk of the guest's tables, as far as it came; page: the EPT walk of the final GPA,
    or of the table that could not be read; access: what both allow.
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
        """Where the byte lies, as the EPT says; None if it is out of reach."""
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
    """Translate a GVA with the guest tables at GPA cr3, all of them found through an EPT.

    ept_walk: GPA to Walk, such as `PageTables.walk`. read_page: the 512 words of a page, by the
    target of an EPT walk. levels: of the guest's paging.
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
    # USER is the guest's to give, READ the EPT's to take: keep what both sides know of.
    access = guest.access & (page.access | Access.USER)
    return NestedWalk(gva, guest, page, access)
