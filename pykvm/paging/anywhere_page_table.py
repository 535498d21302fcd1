"""The Anywhere Page Table: one page, mapped at every GPA where nothing else is.

``VMFUNC`` leaves CR3 as the guest set it, and the EPT that it switches to decides which page lies
at that GPA. Therefore every empty entry of a context's EPT leads, level by level, to the page that
holds the root of the context's guest page table. The walk starts there for any CR3. The tables in
between repeat one entry 512 times, so one table for each level is enough: three more pages for an
EPT of four levels, independent of the number of GPAs.

The page is mapped read-only, which is all that the processor's walk needs: the entries of the guest
page table have their accessed and dirty bits set (`X86Entry`), and the EPTP does not enable EPT
accessed and dirty flags.
"""

from pykvm.paging.entries import ENTRIES, Access, EptEntry, page_size
from pykvm.paging.tables import AddressRangeError, AlignmentError, PageTables
from pykvm.sizes import PAGE_SIZE

__all__ = ["fill_anywhere"]


def fill_anywhere(
    ept: PageTables[EptEntry], target: int, *, exclude: tuple[int, int] | None = None
) -> None:
    """Map every GPA that is not mapped yet to the one 4 KiB page at `target`, read-only.

    Call it last: afterwards nothing can be mapped outside the excluded range. It makes no shared
    table to which nothing leads, because the kernel refuses such a table.

    Args:
        ept: the tables to fill.
        target: address of the page that holds the root of the guest page table, or its number
            times 4096 if the tables hold indices.
        exclude: a range that stays as it is, as its first GPA and one past its last: mapped pages
            remain mapped, absent ones absent. Gate contexts exclude the private range. Therefore
            a sub context maps any CR3 with which a guest passes the gate only to its root.

    Raises:
        AlignmentError: `target` or `exclude` is not a multiple of 4096.
        AddressRangeError: `exclude` is not a range that the tables translate.
        TableLimitError: there are too many tables. The EPT is then half filled; build it again.
    """
    first, last = exclude or (0, 0)
    if (first | last | target) & (PAGE_SIZE - 1):
        raise AlignmentError(
            f"root page {target:#x}, excluded range {first:#x} to {last:#x}", "align to 4096"
        )
    if not 0 <= first <= last <= 1 << (12 + 9 * ept.levels):
        raise AddressRangeError(
            f"excluded range {first:#x} to {last:#x}",
            "give both ends in order, within the levels of the tables",
        )
    filler = _Filler(ept, target, first, last)
    for number in range(len(ept)):
        if ept.base(number) is not None:
            filler.fill(number)


class _Filler:
    """The shared entry of each level, created on first use."""

    def __init__(self, ept: PageTables[EptEntry], target: int, first: int, last: int) -> None:
        self.ept = ept
        self.first = first
        self.last = last
        self.entries: dict[int, int] = {1: int(EptEntry.leaf(1, target, Access.READ))}

    def entry(self, level: int) -> int:
        """Return the entry that fills the empty entries of a table of this level."""
        if level not in self.entries:
            shared = self.ept.add_table(level - 1, None, self.entry(level - 1))
            self.entries[level] = self.ept.entry_to(shared, Access.READ)
        return self.entries[level]

    def fill(self, number: int) -> None:
        table, level = self.ept.table(number), self.ept.level(number)
        if 0 not in table:
            return
        base, size = self.ept.base(number) or 0, page_size(level)
        # Entries before index `low` and from index `high` on lie outside the excluded range. Those
        # in between lie inside it; a bound of the range may cut the first and the last of them.
        low = self._index(self.first - base, size)
        high = self._index(self.last - base + size - 1, size)
        if self.first == self.last or low >= high:
            low = high = 0
        for start, stop in ((0, low), (high, ENTRIES)):
            if 0 in table[start:stop]:
                entry = self.entry(level)
                # Slow, but few tables are partly empty.
                table[start:stop] = type(table)("Q", [word or entry for word in table[start:stop]])
        for index in {low, high - 1} if low < high else ():
            here = base + index * size
            inside = self.first <= here and here + size <= self.last
            if not inside and not table[index]:
                child = self.ept.add_table(level - 1, here)
                self.ept.link(number, index, child)
                self.fill(child)

    @staticmethod
    def _index(offset: int, size: int) -> int:
        return min(max(offset // size, 0), ENTRIES)
