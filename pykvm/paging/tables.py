"""The builder of page tables, EPT and x86, 4 and 5 levels.

`PageTables` holds numbered tables of 512 words; table 0 is the root. The allocator decides what the
address field of an entry holds:

- `TableNumbers`: an index, as in the tables that the kernel takes (``kvm_elisa.h``). Entries above
  the leaves hold the number of a table, leaves the number of a page in a list of pages.
- `TableAddresses`: an address, as in tables that lie in guest memory.

Building an EPT for the kernel and a guest page table for GPA 0x4000100000::

    ept = PageTables(EptEntry, TableNumbers())
    ept.map_pages(0x4000001000, 7, 1, Access.READ | Access.EXECUTE)
    print(ept.walk(0x4000001000))       # GPA 0x4000001000 -> page 7 [r-x WB 4K]
    ept.tobytes()                       # all tables, root first

    guest = PageTables(X86Entry, TableAddresses(0x4000100000, 0x100000))
    guest.map(0x2d4cf4c01000, 0x4000001000, 4096, Access.READ | Access.EXECUTE)
    guest.store(memory.write)           # each table to its address

**How many tables.** A table of level l spans S(l) = 2^(12 + 9 l) bytes. There is one root. At each
level l below it there is one table for each aligned block of S(l) bytes that holds a leaf of level
l or lower. A range [a, b) of 4 KiB pages therefore takes
1 + sum over l = 1 .. levels-1 of (floor((b - 1) / S(l)) - floor(a / S(l)) + 1) tables.
The Anywhere Page Table (`pykvm.paging.anywhere_page_table`) adds one for each level below the root.
For each bound of its excluded range it also adds one for each block of S(l) bytes with the bound
inside, unless the block has a table already or a leaf maps the bound.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from pykvm.errors import PykvmError
from pykvm.paging.entries import (
    ADDRESS_MASK,
    ENTRIES,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    Access,
    Entry,
    MemoryType,
    X86Entry,
    page_size,
    size_name,
)
from pykvm.paging.walk import Span, Walk, spans, walk
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "AddressRangeError",
    "AlignmentError",
    "AlreadyMappedError",
    "PageTables",
    "TableAddresses",
    "TableAllocator",
    "TableLimitError",
    "TableNumbers",
]

E = TypeVar("E", bound=Entry)

# The kernel refuses more: KVM_ELISA_MAX_TABLES in kvm_elisa.h.
MAX_CONTEXT_TABLES: Final = 4096

_EMPTY: Final = array("Q", bytes(8 * ENTRIES))


class AlreadyMappedError(PykvmError, ValueError):
    """A mapping over another one."""


class AlignmentError(PykvmError, ValueError):
    """An address or a size that is not aligned."""


class AddressRangeError(PykvmError, ValueError):
    """A range that the tables cannot translate."""


class TableLimitError(PykvmError, MemoryError):
    """No room for another table."""


class TableAllocator(Protocol):
    """Places of tables.

    The place is a pure function of the number, so that a map that fails allocates nothing.
    """

    @property
    def indexed(self) -> bool:
        """True if address fields hold indices."""

    def address(self, number: int) -> int:
        """Return the address field, in place, of entries that lead to table `number`.

        Raises:
            TableLimitError: there is no room for so many tables.
        """


@dataclass(frozen=True)
class TableNumbers:
    """Allocator for tables whose address fields hold numbers of tables and, in leaves, of pages.

    Attributes:
        limit: largest number of tables.
    """

    limit: int = MAX_CONTEXT_TABLES
    indexed: bool = field(default=True, init=False)

    def address(self, number: int) -> int:
        if number >= self.limit:
            raise TableLimitError(f"more than {self.limit} tables", "map less in one context")
        return number * PAGE_SIZE


@dataclass(frozen=True)
class TableAddresses:
    """Allocator for tables that lie one after the other in memory.

    Attributes:
        base: address of the first table.
        size: bytes for all tables.

    Raises:
        AlignmentError: `base` or `size` is not a multiple of 4096.
    """

    base: int
    size: int
    indexed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if (self.base | self.size) & (PAGE_SIZE - 1) or self.base & ~ADDRESS_MASK:
            raise AlignmentError(f"tables at {self.base:#x}, {self.size:#x} bytes", "align to 4096")

    def address(self, number: int) -> int:
        if (number + 1) * PAGE_SIZE > self.size:
            raise TableLimitError(
                f"more than {self.size // PAGE_SIZE} tables at {self.base:#x}",
                "give them more room",
            )
        return self.base + number * PAGE_SIZE


@dataclass(slots=True)
class _Plan:
    """The changes that a map needs, complete before the first of them is made.

    Attributes:
        delta: target minus address.
        top: level of the largest leaves.
    """

    delta: int
    top: int
    # New tables in order of their number: level, first address, table and index that lead there.
    tables: list[tuple[int, int, int, int]] = field(default_factory=list)
    # Runs of leaves: table number, first index, count, level, address of the first page.
    leaves: list[tuple[int, int, int, int, int]] = field(default_factory=list)


class PageTables(Generic[E]):
    """Page tables of one entry type, empty at first.

    x86 tables take GVAs as the processor does, sign-extended.

    Args:
        entry: `EptEntry` or `X86Entry`.
        allocator: where tables lie, and what address fields hold.
        levels: 4 or 5.
        table_access: what entries above the leaves allow; by default everything, so that the leaf
            decides.

    Raises:
        AddressRangeError: `levels` is neither 4 nor 5.
    """

    def __init__(
        self,
        entry: type[E],
        allocator: TableAllocator,
        *,
        levels: int = 4,
        table_access: Access | None = None,
    ) -> None:
        if levels not in (4, 5):
            raise AddressRangeError(f"{levels} levels", "use 4 or 5")
        self.entry = entry
        self.allocator = allocator
        self.levels = levels
        self.table_access = entry.TABLE_ACCESS if table_access is None else table_access
        self._tables: list[array[int]] = []
        self._level: list[int] = []
        self._base: list[int | None] = []
        self._children: dict[tuple[int, int], int] = {}
        self._number: dict[int, int] = {}
        self._table_bits = int(entry.table(0, self.table_access))
        self.add_table(levels, 0)

    # ---- Mapping ----

    def map(
        self,
        start: int,
        target: int,
        size: int,
        access: Access,
        *,
        max_page: int = SIZE_4K,
        memory_type: MemoryType = MemoryType.WB,
    ) -> None:
        """Map `size` bytes from `start` on to those from `target` on.

        If the call fails, the tables are unchanged.

        Args:
            start: first address; a multiple of 4096, like `target` and `size`.
            target: what the first address translates to; its number times 4096 for numbered pages.
            size: bytes.
            access: what the mapping allows.
            max_page: the largest pages to use where the addresses allow it: `SIZE_4K`, `SIZE_2M`
                or `SIZE_1G`.
            memory_type: memory type of the leaves.

        Raises:
            AlignmentError: an address or the size is not aligned.
            AddressRangeError: the tables cannot translate the range, or `target` is too high.
            AlreadyMappedError: part of the range is mapped.
            TableLimitError: there is no room for the tables that it takes.
            EntryError: the processor would refuse such an access or memory type.
        """
        if (start | target | size) & (PAGE_SIZE - 1):
            raise AlignmentError(
                f"map {start:#x} to {target:#x}, {size:#x} bytes", "align all three to 4096"
            )
        if max_page not in (SIZE_4K, SIZE_2M, SIZE_1G):
            raise AlignmentError(f"pages of {max_page:#x} bytes", "use SIZE_4K, SIZE_2M or SIZE_1G")
        if target < 0 or target + size > ADDRESS_MASK + PAGE_SIZE:
            raise AddressRangeError(f"target {target:#x}, {size:#x} bytes", "stay below 2^52")
        first = self._fold(start, size)
        top = next(level for level in (3, 2, 1) if page_size(level) <= max_page)
        # Start and target have to agree in the bits below a page's size.
        while (first ^ target) & (page_size(top) - 1):
            top -= 1
        patterns = [
            int(self.entry.leaf(level, 0, access, memory_type)) for level in range(1, top + 1)
        ]
        plan = _Plan(target - first, top)
        if size:
            self._plan(plan, 0, self.levels, 0, range(first, first + size))
        self._carry_out(plan, patterns)

    def map_pages(
        self,
        start: int,
        page: int,
        count: int,
        access: Access,
        *,
        memory_type: MemoryType = MemoryType.WB,
    ) -> None:
        """Map 4 KiB pages to numbered pages; see `map`.

        Args:
            start: first address; a multiple of 4096.
            page: number of the page to which the first address translates.
            count: number of pages.
            access: what the mapping allows.
            memory_type: memory type of the leaves.
        """
        self.map(start, page * PAGE_SIZE, count * PAGE_SIZE, access, memory_type=memory_type)

    def _fold(self, start: int, size: int) -> int:
        """Return `start` without sign extension: the bits that index the tables."""
        bits = 12 + 9 * self.levels
        limit = 1 << bits
        if self.entry is X86Entry:
            half = limit >> 1
            if start >= 0 and size >= 0 and start + size <= half:
                return start
            if start >= (1 << 64) - half and size >= 0 and start + size <= 1 << 64:
                return start & (limit - 1)
            raise AddressRangeError(
                f"{start:#x}, {size:#x} bytes: not canonical with {self.levels} levels",
                "use a canonical address",
            )
        if start < 0 or size < 0 or start + size > limit:
            raise AddressRangeError(f"{start:#x}, {size:#x} bytes", f"stay below 2^{bits}")
        return start

    def _plan(self, plan: _Plan, number: int, level: int, base: int, wanted: range) -> None:
        """Add what `wanted`, a range inside table `number`, needs to `plan`; raise on a conflict.

        The table may be one that the plan creates.
        """
        size = page_size(level)
        table = self._tables[number] if number < len(self._tables) else _EMPTY
        at, end = wanted.start, wanted.stop
        while at < end:
            index = (at - base) // size
            if level <= plan.top and not at & (size - 1) and end - at >= size:
                count = (end - at) // size
                if table[index : index + count] != _EMPTY[:count]:
                    raise self._taken(table, range(index, index + count), level, base)
                plan.leaves.append((number, index, count, level, at + plan.delta))
                at += count * size
                continue
            here = base + index * size
            part = range(at, min(end, here + size))
            if not table[index]:
                child = len(self._tables) + len(plan.tables)
                self.allocator.address(child)
                plan.tables.append((level - 1, here, number, index))
            else:
                below = self._children.get((number, index))
                if below is None:  # a leaf, or a table of the Anywhere Page Table
                    raise self._taken(table, range(index, index + 1), level, base)
                child = below
            self._plan(plan, child, level - 1, here, part)
            at = part.stop

    def _taken(
        self, table: Sequence[int], indexes: range, level: int, base: int
    ) -> AlreadyMappedError:
        taken = next(index for index in indexes if table[index])
        at = self._unfold(base + taken * page_size(level))
        size = size_name(page_size(level))
        return AlreadyMappedError(
            f"{self.entry.SPACE} {at:#x} ({size}) is mapped already",
            "choose another place",
        )

    def _carry_out(self, plan: _Plan, patterns: list[int]) -> None:
        for level, base, parent, index in plan.tables:
            self.link(parent, index, self.add_table(level, base))
        for number, index, count, level, target in plan.leaves:
            first = target | patterns[level - 1]
            step = page_size(level)
            # One slice for a run of pages: an array takes a range without a list of its numbers.
            run = array("Q", range(first, first + count * step, step))
            self._tables[number][index : index + count] = run

    # ---- Single tables, for the Anywhere Page Table and for callers that pass tables on ----

    def __len__(self) -> int:
        """Return the number of tables; each takes 4096 bytes."""
        return len(self._tables)

    @property
    def root(self) -> int:
        """Address of the root table, or its number times 4096."""
        return self.allocator.address(0)

    def add_table(self, level: int, base: int | None, fill: int = 0) -> int:
        """Append a table and return its number.

        Args:
            level: level of the table.
            base: the first address that it translates; None for a table that many entries share,
                in which nothing can be mapped.
            fill: initial value of its entries.

        Raises:
            TableLimitError: there is no room for another table.
        """
        number = len(self._tables)
        address = self.allocator.address(number)
        self._tables.append(array("Q", [fill]) * ENTRIES)
        self._level.append(level)
        self._base.append(base)
        self._number[address] = number
        return number

    def link(self, parent: int, index: int, child: int) -> None:
        """Make entry `index` of table `parent` lead to table `child`."""
        self._tables[parent][index] = self.allocator.address(child) | self._table_bits
        self._children[parent, index] = child

    def entry_to(self, number: int, access: Access) -> int:
        """Return an entry that leads to table `number`."""
        return int(self.entry.table(self.allocator.address(number), access))

    def table(self, number: int) -> "array[int]":
        """Return the 512 words of table `number`, not a copy."""
        return self._tables[number]

    def level(self, number: int) -> int:
        return self._level[number]

    def base(self, number: int) -> int | None:
        """Return the first address that table `number` translates, or None for a shared table."""
        return self._base[number]

    def read(self, address: int) -> "array[int]":
        """Return the 512 words of the table at an address: the read function for `walk`."""
        return self._tables[self._number[address]]

    def tobytes(self) -> bytes:
        """Return all tables in order of their number, 4096 bytes each, little endian."""
        return b"".join(map(array.tobytes, self._tables))

    def store(self, write: Callable[[int, bytes], object]) -> None:
        """Write each table to its address, for example with `GuestMemory.write`."""
        for number, table in enumerate(self._tables):
            write(self.allocator.address(number), table.tobytes())

    # ---- Reading back ----

    def walk(self, address: int) -> Walk:
        """Translate one address."""
        return walk(
            self.root,
            address,
            self.entry,
            self.read,
            levels=self.levels,
            indexed=self.allocator.indexed,
        )

    def spans(self, start: int = 0, size: int | None = None) -> Iterator[Span]:
        """Yield the mapped ranges of an address range; neighbours that are mapped alike are joined.

        Args:
            start: first address.
            size: bytes of the address range; by default all from `start` on.
        """
        limit = 1 << 12 + 9 * self.levels
        # Without sign extension; an EPT has none, and maps nothing above its width.
        folded = start & (limit - 1) if self.entry is X86Entry else start
        size = max(limit - folded, 0) if size is None else size
        for span in spans(self.root, folded, size, self.entry, self.read, levels=self.levels):
            yield Span(
                self._unfold(span.start),
                span.size,
                span.target,
                span.access,
                span.memory_type,
                span.repeats,
            )

    def _unfold(self, address: int) -> int:
        bits = 12 + 9 * self.levels
        if self.entry is X86Entry and address >> (bits - 1):
            return address | (1 << 64) - (1 << bits)
        return address

    def __str__(self) -> str:
        """Return a line for each range: `GPA 0x4000001000-0x4000001fff -> page 7 [r-x WB]`."""
        return "\n".join(self._lines(self.spans()))

    def _lines(self, found: Iterable[Span]) -> Iterator[str]:
        for span in found:
            target = f"{self.entry.TARGET} {span.target:#x}"
            if self.allocator.indexed:
                target = f"page {span.target >> 12}"
            more = " everywhere" if span.repeats else " on" if span.size > PAGE_SIZE else ""
            kind = span.memory_type.name if span.memory_type is not None else "?"
            yield (
                f"{self.entry.SPACE} {span.start:#x}-{span.end - 1:#x} -> {target}{more} "
                f"[{self.entry.access_name(span.access)} {kind}]"
            )
