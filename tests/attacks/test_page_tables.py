"""T5, T6, T16: CR3 of the guest's choice, and writes to what translates for a context."""

import struct
from collections.abc import Iterator

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.contexts import ContextPlan
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging.entries import ADDRESS_MASK, Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.leap import Leap, Leaper, Register, give_leaps, left
from tests.rigs.attacks.objects import WILD_DECLARATION
from tests.rigs.attacks.victim import (
    AT_GATE,
    NOTE,
    SHARED,
    SHARED_PAGES,
    WINDOW,
    C,
    join,
    knocks,
    put,
    still_serves,
    stolen,
    stop_at,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment, also_map, window_pages
from tests.rigs.probe import Probe, Wild, calls, give, results, run

pytestmark = pytest.mark.elisa

READ_WRITE = Access.READ | Access.WRITE
# Present, writable, accessed, dirty: the processor sets no more bits. Not user, because SMEP and
# SMAP are enabled.
ENTRY = 0x63
SUB = crossing.SUB_PRIVATE_GPA
TABLES_AT = PAGE_SIZE  # offset in the window of crafted tables, the root first
STACK_AT = 7 * PAGE_SIZE  # offset in the window of a stack that leads home


@pytest.fixture(params=[4, pytest.param(5, marks=pytest.mark.processor("LA57"))])
def guest(kvm: Kvm, request: pytest.FixtureRequest) -> Iterator[BareGuest]:
    """Guest with each number of paging levels."""
    with BareGuest(kvm, Leaper(), paging_levels=request.param) as guest:
        yield guest


def index(gva: int, level: int) -> int:
    return gva >> 12 + 9 * (level - 1) & 511


def table(entries: dict[int, int], like: bytes | bytearray = bytes(PAGE_SIZE)) -> bytes:
    page = bytearray(like)
    for number, gpa in entries.items():
        struct.pack_into("<Q", page, 8 * number, gpa | ENTRY)
    return bytes(page)


def home(instance: ObjectInstance, at: int) -> int:
    """Return the address after the call in the sub entry page, if that page were mapped at `at`."""
    return at + instance.symbols["serve"] - crossing.SUB_ENTRY_OFFSET + 5


def internal_code(instance: ObjectInstance, base: int) -> dict[int, int]:
    """Return a crossing area as a guest would build it: page of the area to GPA.

    Internal code of the object replaces the sub entry. The sub entry is mapped further on too, so
    that its end leads out.
    """
    assert instance.symbols["vault_copy"] % PAGE_SIZE == 0
    return {
        0: layout.ENTRY_PAGE_GPA,
        2: SUB + instance.symbols["vault_copy"],
        3: layout.RETURN_PAGE_GPA,
        5: SUB + crossing.SUB_ENTRY_OFFSET,
        6: layout.RETURN_PAGE_GPA,
    }


def back_stack(guest: BareGuest) -> int:
    """Write a stack into the guest's own memory that leads back; return its address."""
    back = Leaper().image().address_of("leap_back")
    guest.memory.write(layout.STACK_GPA + 0x800, back.to_bytes(8, "little"))
    return layout.STACK_GPA + 0x800


# ---- T5: CR3 names a window ----------------------------------------------------------------------


def craft(guest: BareGuest, instance: ObjectInstance, window_gpa: int) -> tuple[int, Leap]:
    """Write tables into the window that are right if the window is at window_gpa.

    Returns:
        CR3 for them, and the leap that runs the vault's internal code through them with arguments
        of the guest's.
    """
    gpa = window_gpa + TABLES_AT
    own = guest.memory.read(layout.PAGE_TABLES_GPA, PAGE_SIZE)
    data = {index(SHARED, 1) + n: crossing.SUB_MEMORY_GPA + n * PAGE_SIZE for n in range(32)}
    pages = []
    at = gpa
    if guest.paging_levels == 5:
        at += PAGE_SIZE
        pages = [table({index(C, 5): at}, own)]
        (entry,) = struct.unpack_from("<Q", own, 8 * index(C, 5))
        own = guest.memory.read(entry & ADDRESS_MASK, PAGE_SIZE)
    pages += [
        table({index(C, 4): at + PAGE_SIZE}, own),
        table({index(C, 3): at + 2 * PAGE_SIZE}),
        table({index(C, 2): at + 3 * PAGE_SIZE, index(SHARED, 2): at + 4 * PAGE_SIZE}),
        table(internal_code(instance, C)),
        table(data),
    ]
    window = instance.window(0)
    for number, page in enumerate(pages):
        at = TABLES_AT + number * PAGE_SIZE
        window[at : at + PAGE_SIZE] = page
    put(window, STACK_AT, home(instance, C + 5 * PAGE_SIZE))
    put(window, STACK_AT + 8, back_stack(guest))
    registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RSP: WINDOW + STACK_AT}
    return gpa, Leap(slot=2, registers=registers, cr3=gpa)


@pytest.mark.attack("T5")
def test_cr3_names_the_window(kvm: Kvm, guest: BareGuest) -> None:
    """The official code runs, as with any CR3; it refuses the unknown operation, and counts it."""
    with vault() as instance:
        assert join(guest, instance).slot == 2
        cr3, leap = craft(guest, instance, layout.WINDOW_GPA)
        # On a stack of the guest's own: the crafted one leads nowhere when the call returns.
        registers = {Register.RDI: leap.registers[Register.RDI], Register.RSI: SHARED}
        knock = Leap(slot=2, cr3=cr3)
        give_leaps(guest, Leap(slot=2, registers=registers, cr3=cr3), knock)
        assert run(guest) == []
        refused, counted = left(guest)
        assert refused is not None
        assert counted is not None
        assert refused[Register.RAX] == 2**64 - 22  # EINVAL: no such operation
        assert counted[Register.RAX] == knocks(instance) == 1
        used = instance.window(0)[TABLES_AT + 8 * index(C, guest.paging_levels)]
        assert used & 0x20  # the processor used them in the default context
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.attack("T5")
def test_cr3_names_the_window_where_the_sub_context_has_it(kvm: Kvm, guest: BareGuest) -> None:
    """A walk would find the tables there, but the gate maps nothing: the guest stops in it."""
    with vault() as instance:
        join(guest, instance)
        gpa = crossing.SUB_MEMORY_GPA + SHARED_PAGES * PAGE_SIZE
        guest.add_region(instance.window_region(0, gpa))
        cr3, leap = craft(guest, instance, gpa)
        give_leaps(guest, leap)
        exit = stop_at(run(guest), AT_GATE)
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_VIOLATION
        assert exit.gpa >> 12 == cr3 >> 12
        assert exit.rip == C + crossing.GATE_OFFSET  # no instruction of the gate has run
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T5")
def test_a_window_at_its_own_gpa_holds_page_tables(guest: BareGuest) -> None:
    """A naive sub context maps the window at the guest's own GPA."""
    with vault() as instance:
        pages = window_pages(instance)

        def at_its_own_gpa(plan: ContextPlan) -> None:
            also_map(plan, layout.WINDOW_GPA, pages, READ_WRITE)

        weak = WeakAttachment(guest, instance, change_sub=at_its_own_gpa)
        weak.enter_through_gate()
        _, leap = craft(guest, instance, layout.WINDOW_GPA)
        give_leaps(guest, leap)
        assert run(guest) == []
        assert None not in left(guest)
        assert stolen(instance)
        guest.close()
        weak.close()


# ---- T6: CR3 names the contexts' own pages -------------------------------------------------------


def even_base(guest: BareGuest, instance: ObjectInstance) -> int:
    """Return a crossing base whose indexes are all the page number of the vault's notes.

    A table read one level too high or too low then leads on.
    """
    k = instance.symbols["vault_notes"] // PAGE_SIZE
    return sum(k << 12 + 9 * level for level in range(1, guest.paging_levels))


def private_pages() -> dict[str, int]:
    gate, sub = crossing.GATE_PRIVATE_GPA, crossing.SUB_PRIVATE_GPA
    pages = {
        "gate code": gate + crossing.GATE_OFFSET,
        "gate list": gate + crossing.GATE_LIST_OFFSET,
        "gate data": gate + crossing.GATE_DATA_OFFSET,
        "sub entry": sub + crossing.SUB_ENTRY_OFFSET,
        "sub list": sub + crossing.LIST_OFFSET,
        "sub environment": sub + crossing.ENV_OFFSET,
        "sub stack": sub + crossing.STACK_OFFSET,
        "object code": sub + crossing.IMAGE_OFFSET,
        "shared memory": crossing.SUB_MEMORY_GPA,
    }
    for number in range(6):  # as many with five levels, one fewer with four
        gpa = crossing.PRIVATE_TABLES_OFFSET + number * PAGE_SIZE
        if number:
            pages[f"gate table {number}"] = gate + gpa
        pages[f"sub table {number}"] = sub + gpa
    return pages


def own_tables_at(guest: BareGuest, gpa: int) -> int:
    """Give the guest memory at `gpa` with a copy of its root table; return `gpa`.

    Without it the guest could run an instruction or two with such a CR3, and only from its caches.
    """
    with MemoryFile("root", PAGE_SIZE) as file:
        region = Region(file, gpa)
    guest.add_region(region)
    region.view(0, PAGE_SIZE)[:] = guest.memory.read(layout.PAGE_TABLES_GPA, PAGE_SIZE)
    return gpa


@pytest.mark.attack("T6")
@pytest.mark.parametrize("name", private_pages())
def test_cr3_names_a_page_of_a_context(guest: BareGuest, name: str) -> None:
    with vault() as instance:
        base = even_base(guest, instance)
        slot = join(guest, instance, base).slot
        cr3 = own_tables_at(guest, private_pages()[name])
        give_leaps(guest, Leap(slot=slot), Leap(slot=slot, cr3=cr3))
        exit = stop_at(run(guest), AT_GATE)
        assert exit.rip == base + crossing.GATE_OFFSET  # no instruction of the gate has run
        assert left(guest)[1] is None
        assert knocks(instance) == 1
        assert untouched(instance)


@pytest.mark.attack("T6")
def test_cr3_names_the_gates_root(kvm: Kvm, guest: BareGuest) -> None:
    """CR3 may name this page alone: to the sub context it is a GPA like any other."""
    with vault() as instance:
        slot = join(guest, instance, even_base(guest, instance)).slot
        cr3 = own_tables_at(guest, crossing.GATE_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET)
        give_leaps(guest, Leap(slot=slot), Leap(slot=slot, cr3=cr3))
        assert run(guest) == []
        assert knocks(instance) == 2
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T6")
def test_a_gate_that_maps_every_gpa_lets_levels_shift(guest: BareGuest) -> None:
    """If the gate maps the private range, CR3 may name the sub context's second table.

    The walk then ends in a page of the object's data, which the guest has filled.
    """
    with vault() as instance:
        base = even_base(guest, instance)

        def everywhere(plan: ContextPlan) -> None:
            plan._exclude = None

        weak = WeakAttachment(guest, instance, change_gate=everywhere, crossing_gva=base)
        slot = weak.enter_through_gate()
        window, shared = (base + n * PAGE_SIZE for n in (0x20, 0x21))
        data = crossing.SUB_MEMORY_GPA
        entries = internal_code(instance, base)
        entries |= {0x20: data + SHARED_PAGES * PAGE_SIZE, 0x21: data}
        notes = [
            Leap(
                slot=slot,
                registers={Register.RDI: NOTE, Register.RSI: page, Register.RDX: gpa | ENTRY},
            )
            for page, gpa in entries.items()
        ]
        put(instance.window(0), 0x800, home(instance, base + 5 * PAGE_SIZE))
        put(instance.window(0), 0x808, back_stack(guest))
        guest.map(base + 6 * PAGE_SIZE, layout.RETURN_PAGE_GPA, PAGE_SIZE, READ_WRITE | 4)
        cr3 = own_tables_at(guest, SUB + crossing.PRIVATE_TABLES_OFFSET + PAGE_SIZE)
        registers = {
            Register.RDI: window,
            Register.RSI: shared,
            Register.RSP: window + 0x800,
        }
        give_leaps(guest, *notes, Leap(slot=slot, registers=registers, cr3=cr3))
        assert run(guest) == []
        assert None not in left(guest)
        assert stolen(instance)
        guest.close()
        weak.close()


# ---- T16: writes to tables, code and list --------------------------------------------------------

ALIAS = 0x80000  # an offset in the crossing area that a sub context does not use
SPOILED = b"\xb8\x37\x13\x00\x00\xc3"  # mov $0x1337, %eax; ret


@pytest.mark.control("T16")
def test_writable_code_is_rewritten(kvm: Kvm) -> None:
    """An object that writes where its caller says can be rewritten.

    The kernel refuses pages that are writable and executable; here the same page is both, at two
    addresses.
    """
    with WILD_DECLARATION.open() as instance, BareGuest(kvm, Probe()) as guest:
        (code,) = [
            pages for offset, pages, _ in instance._image.common if offset == crossing.IMAGE_OFFSET
        ]
        weak = WeakAttachment(guest, instance, extra=[(ALIAS, code, READ_WRITE)])
        slot = weak.enter_through_gate()
        at = C + ALIAS + instance.symbols["elisa_serve"] - crossing.IMAGE_OFFSET
        spoiled = int.from_bytes(SPOILED.ljust(8, b"\xcc"), "little")
        give(
            guest,
            calls(slot, Wild.HELLO),
            calls(slot, Wild.WRITE, at, spoiled),
            calls(slot, Wild.HELLO),
        )
        run(guest)
        assert results(guest) == [1000, 0, 0x1337]
        guest.close()
        weak.close()


@pytest.mark.control("T16")
def test_writable_tables_are_rewritten(kvm: Kvm) -> None:
    """The guest replaces the object's environment by its window and passes for another guest."""
    with WILD_DECLARATION.open() as instance, BareGuest(kvm, Probe()) as guest:
        tables_gpa = SUB + crossing.PRIVATE_TABLES_OFFSET

        def reach_tables(plan: ContextPlan) -> None:
            plan.guest.map(C + ALIAS, tables_gpa, 8 * PAGE_SIZE, Access(7))

        weak = WeakAttachment(guest, instance, change_sub=reach_tables, tables=READ_WRITE)
        slot = weak.enter_through_gate()
        last = 3  # root, then one table of each level: the last one maps the crossing area
        env = C + ALIAS + last * PAGE_SIZE + 8 * index(C + crossing.ENV_OFFSET, 1)
        forged = instance.declaration.env(C + crossing.SHARED_OFFSET, 1)
        instance.window(0)[: len(forged)] = forged
        window = crossing.SUB_MEMORY_GPA + PAGE_SIZE
        give(
            guest,
            calls(slot, Wild.HELLO),
            calls(slot, Wild.WRITE, env, window | ENTRY),
            calls(slot, Wild.HELLO),
        )
        run(guest)
        assert results(guest) == [1000, 0, 1001]
        guest.close()
        weak.close()
