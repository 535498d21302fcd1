"""All memory that the processor can reach from a CR3 of the guest's choice.

Invariant I3 demands that a walk which starts at one of a gate context's own private pages (a table
of any level read as a root, the EPTP list page, a page of code) reaches no executable page.
`reachable_from` shows it by enumeration::

    for gpa in private_gpas:
        for reach in reachable_from(gpa, gate_ept, read_page):
            assert not reach.access & Access.EXECUTE, reach
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pykvm.paging.entries import Access, EptEntry, X86Entry, page_size
from pykvm.paging.tables import PageTables
from pykvm.paging.walk import ReadTable

__all__ = ["Reach", "reachable_from"]


@dataclass(frozen=True, slots=True)
class Reach:
    """A range of GVAs that translates.

    Attributes:
        gva: first address of the range.
        size: bytes of the range.
        page: number of the page at the first address.
        access: what the EPT allows.
        guest: what the guest's entries allow. They do not bind a guest, which chooses CR0.WP,
            EFER.NXE, CR4.SMEP and its privilege level.
        repeats: whether each 4 KiB of the range leads to the same page.
    """

    gva: int
    size: int
    page: int
    access: Access
    guest: Access
    repeats: bool

    def __str__(self) -> str:
        everywhere = " everywhere" * self.repeats
        return (
            f"GVA {self.gva:#x}, {self.size:#x} bytes -> page {self.page}{everywhere} "
            f"[{EptEntry.access_name(self.access)}, guest {X86Entry.access_name(self.guest)}]"
        )


def reachable_from(
    cr3: int, ept: PageTables[EptEntry], read_page: ReadTable, *, levels: int = 4
) -> list[Reach]:
    """Return all GVAs that translate when the guest's page-table root lies at GPA `cr3`.

    The time grows with the number of present entries, so this is for trusted pages, not for hostile
    ones. Address bits up to 51 count as implemented and execute-disable as unused: the result has
    everything that a processor accepts, and possibly more.

    Args:
        cr3: the guest's CR3; bits 0 to 11 are ignored.
        ept: the context's tables.
        read_page: function that returns the 512 words of a page, given the target of an EPT walk:
            the page's number times 4096.
        levels: levels of the guest's paging, 4 or 5.
    """
    visitor = _Visitor(ept, read_page)
    bits = 12 + 9 * levels
    return [
        replace(reach, gva=reach.gva | (1 << 64) - (1 << bits))
        if reach.gva >> (bits - 1)
        else reach
        for reach in visitor.visit(cr3 & ~0xFFF, levels)
    ]


@dataclass(slots=True)
class _Visitor:
    ept: PageTables[EptEntry]
    read_page: ReadTable
    # By page and level, because walks meet the same page many times. Recursion ends because the
    # level decreases.
    seen: dict[tuple[int, int], list[Reach]] = field(default_factory=dict)

    def visit(self, gpa: int, level: int) -> list[Reach]:
        """Return the ranges that the page at `gpa`, read as a table of this level, translates.

        GVAs are relative to the first that the table translates.
        """
        found = self.ept.walk(gpa)
        if found.target is None or not found.access & Access.READ:
            return []
        key = (found.target, level)
        if key not in self.seen:
            self.seen[key] = list(self._entries(self.read_page(found.target), level))
        return self.seen[key]

    def _entries(self, words: Sequence[int], level: int) -> Iterator[Reach]:
        size = page_size(level)
        for index, word in enumerate(words):
            if not word & 1:
                continue
            entry = X86Entry(word)
            if entry.faults(level):
                continue
            if not entry.is_leaf(level):
                for below in self.visit(entry.address, level - 1):
                    yield replace(
                        below, gva=below.gva + index * size, guest=below.guest & entry.access
                    )
                continue
            gpa = entry.target(level)
            for span in self.ept.spans(gpa, size):
                yield Reach(
                    index * size + span.start - gpa,
                    span.size,
                    span.target >> 12,
                    span.access,
                    entry.access,
                    span.repeats,
                )
