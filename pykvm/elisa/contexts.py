"""Plans of gate and sub contexts: pure data, made before any call of the kernel.

A context has two translations, which are both built here: its guest page table (GVA to GPA), which
the Anywhere Page Table finds whatever CR3 holds, and its EPT (GPA to page). The page at crossing
base + x has the GPA private base + x, and the guest page table itself is at
``crossing.PRIVATE_TABLES_OFFSET`` from that private base. An object's memory is at
``crossing.SUB_MEMORY_GPA`` instead: its part of the EPT is the kernel's, made when the memory was
registered, and the plan only names its parts of 1 GiB.

These invariants hold by construction:

- I3: a sub context maps nothing but the root outside its private range, and a gate context leaves
  the whole private range absent but for its own pages, from which no walk reaches code.
- I4: guest page tables are read-only in the EPT, their accessed and dirty bits are set, and nothing
  is writable and executable.
- I8, second layer: windows, which a guest can write, and shared memory consist of user pages, for
  callers in kernel mode too. The processor's own reads of an IDT, GDT or TSS count as supervisor
  accesses, and CR4.SMAP keeps those off user pages, even with RFLAGS.AC set (SDM vol. 3A 4.6.1).
  The object's own accesses run between STAC and CLAC (sub.S). The first layer is KVM's: it keeps
  descriptor tables out of the range that `ContextPlan.gva` and ``size`` name.
- T26: leaves are write-back, and the kernel sets "ignore PAT" in each, so that neither the guest's
  PAT nor its CR3.PCD changes the type of trusted memory.

Plans for guests with five-level paging (``levels=5``) keep the same rules; their tables have one
level more.

`ContextPlan.cost` is the number of pages that a context takes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pykvm.elisa import crossing
from pykvm.errors import PykvmError
from pykvm.paging.anywhere_page_table import fill_anywhere
from pykvm.paging.entries import SIZE_1G, SIZE_2M, Access, EptEntry, X86Entry
from pykvm.paging.tables import (
    AddressRangeError,
    PageTables,
    TableAddresses,
    TableNumbers,
)
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "ContextCost",
    "ContextPlan",
    "CrossingBaseError",
    "EptpPage",
    "ListPage",
    "Page",
    "UserPages",
    "check_crossing_base",
    "plan_gate",
    "plan_sub",
]

READ: Final = Access.READ
READ_WRITE: Final = Access.READ | Access.WRITE
READ_EXECUTE: Final = Access.READ | Access.EXECUTE

# The EPT decides what a context may do. Its guest page table allows everything, so that the guest's
# CR0.WP, CR4.SMEP and EFER.NXE do not matter to it.
_GUEST_ACCESS: Final = Access.READ | Access.WRITE | Access.EXECUTE


class CrossingBaseError(PykvmError, ValueError):
    """A crossing area at an address where it cannot be."""


@dataclass(frozen=True)
class UserPages:
    """Pages of this process, which the kernel pins.

    Attributes:
        address: address of the first one.
        count: how many there are.
    """

    address: int
    count: int = 1


@dataclass(frozen=True)
class ListPage:
    """The EPTP list page of the vCPU that the context is for."""

    count: int = 1


@dataclass(frozen=True)
class EptpPage:
    """A page of the kernel that begins with the EPTP of the sub context."""

    count: int = 1


Page = UserPages | ListPage | EptpPage


@dataclass(frozen=True)
class ContextCost:
    """Pages that one context takes.

    Attributes:
        ept_tables: tables of the EPT, which the kernel owns.
        guest_tables: pages of the guest page table, pinned.
        mapped: other pages that the context maps, pinned or owned by the kernel, without the
            object's memory.
    """

    ept_tables: int
    guest_tables: int
    mapped: int


@dataclass(frozen=True)
class _Mapping:
    """Page of a context, at an offset from the crossing base.

    Attributes:
        offset: offset of its first byte.
        page: the page or pages.
        access: what the EPT allows.
    """

    offset: int
    page: Page
    access: Access


class ContextPlan:
    """Plan of one context.

    It is made in two steps, because the guest page table needs memory before its pages can be
    mapped: create the plan, provide `guest_table_bytes` of memory, call `place_guest_tables`.

    Attributes:
        ept: tables of the EPT.
        guest: guest page table.
        pages: the pages that the EPT maps, in the order of their numbers.
        parts: how many parts of the object's memory it maps, 1 GiB each.
        gva: first GVA that the guest page table maps.
        size: bytes from there to the end of the last page that it maps.
        levels: levels of the guest's paging, 4 or 5.
    """

    def __init__(
        self,
        private_gpa: int,
        crossing_gva: int,
        mappings: Iterable[_Mapping],
        *,
        user: bool = False,
        levels: int = 4,
        memory: int = 0,
        exclude: tuple[int, int] | None = None,
    ) -> None:
        check_crossing_base(crossing_gva, levels)
        self._private_gpa = private_gpa
        self._exclude = exclude
        self._tables_gpa = private_gpa + crossing.PRIVATE_TABLES_OFFSET
        self.pages: list[Page] = []
        self.levels = levels
        mappings = list(mappings)
        self.gva = crossing_gva + min(mapping.offset for mapping in mappings)
        end = max(mapping.offset + mapping.page.count * PAGE_SIZE for mapping in mappings)
        # Whole large pages, so that the tables do not depend on the size. What they map beyond the
        # memory is absent in the EPT.
        memory = -(-memory // SIZE_2M) * SIZE_2M
        if memory:
            end = crossing.SHARED_OFFSET + memory
        self.size = crossing_gva + end - self.gva
        self.ept: PageTables[EptEntry] = PageTables(EptEntry, TableNumbers())
        self.guest: PageTables[X86Entry] = PageTables(
            X86Entry,
            TableAddresses(self._tables_gpa, crossing.PRIVATE_TABLES_SIZE),
            levels=levels,
        )
        self._number = 0
        for mapping in mappings:
            gpa = private_gpa + mapping.offset
            access = _GUEST_ACCESS | (Access.USER if user else Access.NONE)
            self.guest.map(
                crossing_gva + mapping.offset, gpa, mapping.page.count * PAGE_SIZE, access
            )
            self._map(gpa, mapping.page, mapping.access)
        self.parts = -(-memory // SIZE_1G)
        if memory:
            self._map_memory(crossing_gva + crossing.SHARED_OFFSET, memory)

    def _map_memory(self, gva: int, size: int) -> None:
        """Map the object's memory: user pages even for callers in kernel mode."""
        gpa = crossing.SUB_MEMORY_GPA
        try:
            self.guest.map(gva, gpa, size, _GUEST_ACCESS | Access.USER, max_page=SIZE_2M)
        except AddressRangeError as error:
            raise CrossingBaseError(
                f"{size >> 20} MiB of memory do not fit behind {gva:#x}",
                "use a lower crossing base, or give the object less memory",
            ) from error
        # Part n is named by the address (n + 1) GiB, which no number of a page reaches.
        self.ept.map(gpa, SIZE_1G, self.parts * SIZE_1G, READ_WRITE, max_page=SIZE_1G)

    def _map(self, gpa: int, page: Page, access: Access) -> int:
        first = self._number
        if (
            not crossing.PRIVATE_GPA_FIRST
            <= gpa
            <= crossing.PRIVATE_GPA_END - page.count * PAGE_SIZE
        ):
            raise CrossingBaseError(
                f"GPA {gpa:#x} is outside the private range", "give the object less memory"
            )
        self.ept.map_pages(gpa, first, page.count, access)
        self.pages.append(page)
        self._number += page.count
        return first

    @property
    def guest_table_bytes(self) -> int:
        """Bytes of memory that the guest page table needs, a multiple of 4096."""
        return len(self.guest) * PAGE_SIZE

    def place_guest_tables(self, memory: memoryview, address: int) -> None:
        """Write the guest page table into memory, which completes the plan.

        Args:
            memory: `guest_table_bytes` of memory.
            address: address of the memory in this process.
        """
        root = self._map(self._tables_gpa, UserPages(address, len(self.guest)), READ)
        memory[:] = self.guest.tobytes()
        fill_anywhere(self.ept, root * PAGE_SIZE, exclude=self._exclude)

    @property
    def cost(self) -> ContextCost:
        """Pages that the complete plan takes."""
        return ContextCost(len(self.ept), len(self.guest), self._number - len(self.guest))

    def __str__(self) -> str:
        """Return the guest page table and the EPT as text, with a line for each range."""
        return f"{self.guest}\n{self.ept}"


def check_crossing_base(crossing_gva: int, levels: int = 4) -> None:
    """Check that the crossing area can be at `crossing_gva`.

    Raises:
        CrossingBaseError: the address is not aligned to 2 MiB or not canonical, or compatibility
            mode could reach it, or what the gate maps below it.
    """
    half = 1 << (11 + 9 * levels)
    low = crossing.CROSSING_MIN_GVA <= crossing_gva < half
    high = (1 << 64) - half <= crossing_gva < 1 << 64
    if crossing_gva % crossing.CROSSING_ALIGN or not (low or high):
        raise CrossingBaseError(
            f"no crossing area at {crossing_gva:#x}",
            f"use a canonical address from {crossing.CROSSING_MIN_GVA:#x} on, "
            f"a multiple of {crossing.CROSSING_ALIGN:#x}",
        )


def plan_gate(
    gate_page: int, crossing_gva: int, *, user: bool = False, levels: int = 4
) -> ContextPlan:
    """Plan the gate context of an attachment: gate page, the vCPU's EPTP list, the official EPTP.

    Args:
        gate_page: address of the gate page in this process.
        crossing_gva: crossing base.
        user: whether callers run in user mode.
        levels: levels of the guest's paging, 4 or 5.

    Raises:
        CrossingBaseError: the crossing area cannot be there.
    """
    return ContextPlan(
        crossing.GATE_PRIVATE_GPA,
        crossing_gva,
        [
            _Mapping(crossing.GATE_OFFSET, UserPages(gate_page), READ_EXECUTE),
            _Mapping(crossing.GATE_LIST_OFFSET, ListPage(), READ_WRITE),
            _Mapping(crossing.GATE_DATA_OFFSET, EptpPage(), READ),
        ],
        user=user,
        levels=levels,
        exclude=(crossing.PRIVATE_GPA_FIRST, crossing.PRIVATE_GPA_END),
    )


def plan_sub(
    image: Sequence[tuple[int, UserPages, Access]],
    env_page: int,
    stack: int,
    memory: int,
    crossing_gva: int,
    *,
    user: bool = False,
    levels: int = 4,
) -> ContextPlan:
    """Plan the sub context of an attachment.

    Args:
        image: offset from the crossing base, pages and access of each part of the object's image.
        env_page: address of the environment's page in this process.
        stack: address of the stack's memory in this process.
        memory: bytes of shared memory and windows, up to `crossing.MAX_MEMORY`.
        crossing_gva: crossing base.
        user: whether callers run in user mode.
        levels: levels of the guest's paging, 4 or 5.

    Raises:
        CrossingBaseError: the crossing area cannot be there, or the object has too much memory.
    """
    return ContextPlan(
        crossing.SUB_PRIVATE_GPA,
        crossing_gva,
        [
            *(_Mapping(offset, pages, access) for offset, pages, access in image),
            _Mapping(crossing.LIST_OFFSET, ListPage(), READ_WRITE),
            _Mapping(crossing.ENV_OFFSET, UserPages(env_page), READ),
            _Mapping(
                crossing.STACK_OFFSET,
                UserPages(stack, crossing.STACK_SIZE // PAGE_SIZE),
                READ_WRITE,
            ),
        ],
        user=user,
        levels=levels,
        memory=memory,
    )
