"""A guest that stays inside an object until the test releases it (objects/spin.c)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.elisa.trusted_images import CrossingImages, crossing_images
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import Probe, prepare
from tests.rigs.sources import OBJECTS
from tests.rigs.waiting import wait_for

SPIN = OBJECTS / "spin.c"

LONG = 1 << 40
"""A number of turns that no test waits for."""

C = crossing.CROSSING_GVA
# The guest's own page in its default context, with the VMFUNC that leads to the gate.
ENTRY_PAGE = range(C + crossing.ENTRY_OFFSET, C + crossing.ENTRY_OFFSET + 0x1000)
RETURN_PAGE = C + crossing.RETURN_OFFSET
CROSSING_AREA = range(C + crossing.GATE_DATA_OFFSET, C + (1 << 30))
"""Addresses that the gate and the sub contexts of these tests map, and more."""


def spin_object(guests: int = 3) -> SharedObject:
    return SharedObject("spin", SPIN, guests=guests)


@contextmanager
def event_guest(kvm: Kvm, *, name: str = "guest", levels: int = 4) -> Iterator[BareGuest]:
    """Create a guest with a local APIC that records what interrupts it.

    Args:
        levels: levels of its paging.
    """
    program = Probe(events=True)
    with BareGuest(kvm, program, irqchip=True, name=name, paging_levels=levels) as guest:
        prepare(guest)
        yield guest


class Spin:
    """The object's progress as the host sees it, and the word that releases it."""

    def __init__(self, instance: ObjectInstance) -> None:
        self._words = instance.shared.cast("Q")

    @property
    def begun(self) -> int:
        return self._words[0]

    @property
    def ended(self) -> int:
        return self._words[1]

    @property
    def inside(self) -> bool:
        return self.begun != self.ended

    @property
    def turns(self) -> int:
        return self._words[3]

    def forget(self) -> None:
        """Release the view of the object's memory, which keeps it mapped."""
        self._words.release()

    def hold(self) -> None:
        self._words[2] = 0

    def release(self) -> None:
        self._words[2] = 1

    def wait_until_inside(self, calls: int = 1) -> None:
        wait_for(lambda: self.begun == calls and self.turns > 0)

    def work_on(self, turns: int = 20_000) -> None:
        """Wait until the object makes more turns: the vCPU has been entered again, and runs."""
        now = self.turns
        wait_for(lambda: self.turns >= now + turns)
        assert self.inside


def crossing_with_sti() -> CrossingImages:
    """Return the guest's pages of the crossing with STI right before the VMFUNC of the entry page.

    The interrupts that STI enables wait for one more instruction (SDM vol. 3A, 6.8.1).
    """
    images = crossing_images()
    entry = images.entry_page[:-6] + bytes.fromhex("31C0 FB 0F01D4")
    return replace(images, entry_page=entry, call_offset=len(entry) - 6)
