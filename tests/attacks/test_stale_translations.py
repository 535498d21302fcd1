"""T22: pages of a context that by now belong to another owner."""

import gc
import os
import struct
from collections.abc import Iterator, Sequence

import pytest

from pykvm.closeable import Closeable
from pykvm.elisa import crossing
from pykvm.elisa.attachment import Attachment
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.trusted_images import crossing_images
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import MemoryFile, Region
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.host_addresses import host_address
from tests.rigs.attacks.host_tables import (
    RECKLESS,
    HostMemory,
    HostTables,
    both_contexts,
    read_list,
)
from tests.rigs.attacks.leap import Leap, Leaper, Register, give_leaps, left
from tests.rigs.attacks.page_frees import base_of_pages, flushed_before, traced_frees
from tests.rigs.attacks.vault_calls import failed
from tests.rigs.attacks.victim import SHARED, C, put
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import Wild, run
from tests.rigs.tracefs import mount_tracefs

pytestmark = pytest.mark.elisa

PAGES = RECKLESS.shared // PAGE_SIZE
WORD = 0x0B1E_C700_0000_0000  # a word of an object's page: this plus its number
NEW_WORD = 0x4E30_0000_0000_0000
PATTERN = 0x5EC0_4D40_5EC0_4D40  # content of the pages after their next owner has written them
HEIR_SIZE = 128 << 20
ATTEMPTS = 8


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with HostMemory() as memory:
        yield memory


def read_page(slot: int, page: int, behind: int = 0) -> Leap:
    at = SHARED + page * PAGE_SIZE
    return Leap(behind, slot, {Register.RDI: Wild.READ, Register.RSI: at})


def again(guest: BareGuest, *leaps: Leap) -> None:
    """Start the guest's program anew on the same vCPU, with all that it has cached."""
    guest.set_input(Leaper(leaps).input())
    guest.start_vcpu(guest.vcpu, Leaper().image().entry, layout.STACK_TOP_GPA, layout.BOOT_INFO_GPA)


def words(guest: BareGuest) -> list[int | None]:
    """Return the result of each leap."""
    return [out[Register.RAX] if out else None for out in left(guest)]


def filled(first: int) -> ObjectInstance:
    """Open a reckless object whose pages begin with `first` and the next numbers."""
    instance = RECKLESS.open()
    for page in range(PAGES):
        put(instance.shared, page * PAGE_SIZE, first + page)
    return instance


class Used:
    """An object each of whose pages the guest has read from inside."""

    def __init__(self, guest: BareGuest, memory: HostMemory) -> None:
        guest.map_crossing(crossing_images())
        self.instance = filled(WORD)
        self.places = [
            C + self.instance.symbols["elisa_serve"],
            C + crossing.SUB_ENTRY_OFFSET + 8,
            C + crossing.GATE_OFFSET + 0xFD8,
        ]
        give_leaps(guest, *(Leap(place) for place in self.places))  # map the guest's own pages
        self._guest, self._memory = guest, memory
        self.attachment: Attachment = self.instance.attach_vcpu(guest.vcpu, 0)
        what, at = read_list(self.attachment.slot)
        registers = {Register.RDI: what, Register.RSI: at}
        again(guest, Leap(slot=self.attachment.slot, registers=registers))
        assert run(guest) == []
        (eptp,) = words(guest)
        assert eptp
        _, sub = both_contexts(memory, eptp)
        self.list_page = sub.page(crossing.SUB_PRIVATE_GPA + crossing.LIST_OFFSET)
        self.frames = [
            host_address(self.instance.memory.host_address + page * PAGE_SIZE)
            for page in range(PAGES)
        ]
        first = crossing.SUB_MEMORY_GPA
        assert [sub.page(first + page * PAGE_SIZE) for page in range(PAGES)] == self.frames
        self.touch()

    def touch(self) -> None:
        slot = self.attachment.slot
        again(self._guest, *(read_page(slot, page) for page in range(PAGES)))
        assert run(self._guest) == []
        assert words(self._guest) == [WORD + page for page in range(PAGES)]

    def slots(self) -> Sequence[int]:
        """The vCPU's EPTP list, read from the host's memory."""
        return self._memory.table(self.list_page)

    def contexts_in(self, slot: int) -> tuple[HostTables, HostTables]:
        return both_contexts(self._memory, self.slots()[slot])

    def give_back(self) -> None:
        """Detach and close, so that nothing holds the pages any more."""
        self.attachment.detach()
        self.instance.close()


class Heir(Closeable):
    """A large block of memory of another owner, which includes former pages of the object."""

    def __init__(self) -> None:
        gc.collect()  # drop remaining references to the object's memory
        with MemoryFile("heir", HEIR_SIZE) as file:
            self._region = Region(file, 0, prefault=True)
        count = HEIR_SIZE // PAGE_SIZE
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self._region.host_address // PAGE_SIZE * 8)
            entries = struct.unpack(f"<{count}Q", pagemap.read(count * 8))
        self._pages = {(entry & (1 << 55) - 1) * PAGE_SIZE: n for n, entry in enumerate(entries)}

    def close(self) -> None:
        self._region.close()

    def pages_of(self, used: Used, memory: HostMemory) -> list[int]:
        """Return the former pages of the object in this block; they hold the pattern."""
        pages = [n for n, frame in enumerate(used.frames) if frame in self._pages]
        for page in pages:
            at = self._pages[used.frames[page]] * PAGE_SIZE
            self._region.view(at, PAGE_SIZE)[:] = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)
            assert memory.table(used.frames[page]) == (PATTERN,) * 512
        return pages


def pages_of_another_owner(guest: BareGuest, memory: HostMemory) -> None:
    """Try stale translations after the pages have got another owner.

    The guest executes VMFUNC with each slot at places where it was inside before, with registers
    that would read the pages.
    """
    used = Used(guest, memory)
    used.give_back()
    with Heir() as heir:
        pages = heir.pages_of(used, memory)
        assert pages, "nobody has taken the object's pages"
        stray = [
            read_page(slot, pages[slot % len(pages)], used.places[slot % len(used.places)])
            for slot in range(1, 512)
        ]
        slot = used.attachment.slot
        stray += [read_page(slot, page, place) for page in pages for place in used.places]
        again(guest, *stray)
        assert failed(run(guest)) == [(0, leap.slot) for leap in stray]
        assert None not in left(guest)
        assert not seen(guest)


def pages_under_an_old_eptp(guest: BareGuest, memory: HostMemory) -> None:
    """Give a sub context the root, and with it the EPTP, of one that is gone.

    Translations are cached by EPTP (SDM vol. 3C 29.4.1): those of the old context would be valid
    for the new one.
    """
    used = Used(guest, memory)
    with used.instance as old, filled(NEW_WORD) as new:
        used.attachment.detach()
        for _ in range(2):  # until each takes the pages that the other has left
            for instance in (old, new):
                instance.attach_vcpu(guest.vcpu, 0).detach()
        used.attachment = old.attach_vcpu(guest.vcpu, 0)
        _, sub = used.contexts_in(used.attachment.slot)
        used.touch()
        used.attachment.detach()
        for _ in range(ATTEMPTS):
            attachment = new.attach_vcpu(guest.vcpu, 0)
            if used.contexts_in(attachment.slot)[1].eptp == sub.eptp:
                break
            attachment.detach()
        else:
            raise AssertionError("no new context has the old one's root")
        again(guest, *(read_page(attachment.slot, page) for page in range(PAGES)))
        assert run(guest) == []
        assert words(guest) == [NEW_WORD + page for page in range(PAGES)]
        guest.close()


def seen(guest: BareGuest) -> bool:
    """Return whether the pattern is in a register, now or after any leap."""
    registers = guest.vcpu.get_regs()
    values = [getattr(registers, name.name.lower()) for name in Register if name.name != "RFLAGS"]
    return PATTERN in values or any(PATTERN in out.values() for out in left(guest) if out)


@pytest.mark.attack("T22")
def test_pages_that_are_somebody_elses_by_now(guest: BareGuest, memory: HostMemory) -> None:
    pages_of_another_owner(guest, memory)


@pytest.mark.attack("T22")
def test_a_new_context_with_the_root_of_an_old_one(guest: BareGuest, memory: HostMemory) -> None:
    pages_under_an_old_eptp(guest, memory)


@pytest.mark.attack("T22")
@pytest.mark.weakened
def test_the_emulator_keeps_no_translations_to_be_stale(
    guest: BareGuest, memory: HostMemory
) -> None:
    """Without INVEPT the attack fails here all the same.

    If this test fails, the processor keeps translations as real ones do, and then the attack test
    shows more than it does here.
    """
    with weakened(Weaken.INVEPT):
        pages_under_an_old_eptp(guest, memory)


# ---- effect of the flush -------------------------------------------------------------------------


@pytest.fixture
def tracing() -> None:
    mount_tracefs()


def flushed(guest: BareGuest, memory: HostMemory) -> list[set[int]]:
    """Return the processors that flushed gate and sub context in time, one set for each.

    In time means before the pages that they map, or their tables, were given back.
    """
    used = Used(guest, memory)
    gate, sub = used.contexts_in(used.attachment.slot)
    with traced_frees() as events:
        used.give_back()
    base = base_of_pages(events, [gate, sub])
    return [
        flushed_before(events, base, gate, []),
        flushed_before(events, base, sub, used.frames),
    ]


@pytest.mark.attack("T22")
@pytest.mark.usefixtures("tracing")
def test_every_processor_flushes_before_pages_go_back(guest: BareGuest, memory: HostMemory) -> None:
    processors = set(range(os.cpu_count() or 1))
    assert flushed(guest, memory) == [processors, processors]


@pytest.mark.attack("T22")
@pytest.mark.weakened
@pytest.mark.usefixtures("tracing")
def test_pages_go_back_without_a_flush(guest: BareGuest, memory: HostMemory) -> None:
    with weakened(Weaken.INVEPT):
        assert flushed(guest, memory) == [set(), set()]
