"""T25, T28: a VMM that puts a context into a list for which it was not made."""

import errno
from collections.abc import Iterator

import pytest

from pykvm.elisa import calls, crossing
from pykvm.elisa.calls import Context
from pykvm.elisa.contexts import ContextPlan, ListPage, UserPages
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.trusted_images import crossing_images
from pykvm.kernel import uapi
from pykvm.kvm import Exit, IoctlError, Kvm, Vcpu
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import MemoryFile, Region
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.leap import Leap, Leaper, Register, give_leaps, left
from tests.rigs.attacks.vault_calls import copy_secret, failed, home_stack
from tests.rigs.attacks.victim import (
    AT_GATE,
    WINDOW,
    WINDOW_PAGES,
    C,
    knocks,
    put,
    stolen,
    stop_at,
    untouched,
    vault,
    word,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import Probe, run

pytestmark = pytest.mark.elisa

TRANSIENT = uapi.lib.KVM_ELISA_SLOT_TRANSIENT
SLOT = 2


def refused(vcpu: Vcpu, slot: int, context: Context) -> bool:
    """Return whether the kernel refuses the context for the vCPU's list."""
    with pytest.raises(IoctlError) as caught:
        calls.set_slot(vcpu, slot, context)
    return caught.value.errno == errno.EINVAL


# ---- T28: the list of another vCPU ---------------------------------------------------------------


def second_vcpu(guest: BareGuest) -> Vcpu:
    """Create a vCPU at the program's start, with half of the stack."""
    vcpu = guest.vm.create_vcpu(1)
    stack = (layout.STACK_GPA + layout.STACK_TOP_GPA) // 2
    guest.start_vcpu(vcpu, Leaper().image().entry, stack, layout.BOOT_INFO_GPA)
    return vcpu


def run_on(guest: BareGuest, vcpu: Vcpu, *leaps: Leap) -> list[Exit]:
    """Replace the leaps and run another of the guest's vCPUs."""
    guest.set_input(Leaper(leaps).input())
    return run(guest, vcpu=vcpu)


@pytest.mark.attack("T28")
def test_a_gate_for_another_vcpu(guest: BareGuest) -> None:
    """Only the vCPU for which gate and sub context were made can install them.

    Neither vCPU reaches the object except through its own gate.
    """
    with vault() as instance:
        other = second_vcpu(guest)
        weak = WeakAttachment(guest, instance, vcpu=other)
        home_stack(guest)
        own = instance.attach_vcpu(guest.vcpu, 1).slot
        assert refused(guest.vcpu, own + 1, weak.gate)
        assert refused(guest.vcpu, own + 1, weak.sub)
        calls.set_slot(other, SLOT, weak.gate)
        transient = copy_secret(instance, TRANSIENT)
        stray = [Leap(transient.behind, own + 1), transient]
        give_leaps(guest, Leap(slot=own), *stray)
        assert failed(run(guest)) == [(0, own + 1), (0, TRANSIENT)]
        assert None not in left(guest)
        assert failed(run_on(guest, other, Leap(slot=SLOT), transient)) == [(0, TRANSIENT)]
        assert None not in left(guest)
        assert knocks(instance) == 2
        assert untouched(instance)
        guest.close()
        weak.close()


@pytest.mark.control("T28")
@pytest.mark.weakened
def test_a_gate_that_opens_another_vcpus_slot(guest: BareGuest) -> None:
    """vCPU 0 fills the transient slot of vCPU 1 and stops at the gate's end; its own is empty.

    vCPU 1 then enters internal code from its default context.
    """
    with weakened(Weaken.LIST), vault() as instance:
        other = second_vcpu(guest)
        weak = WeakAttachment(guest, instance, vcpu=other)
        home_stack(guest)
        calls.set_slot(other, SLOT, weak.gate)
        calls.set_slot(guest.vcpu, SLOT, weak.gate)
        transient = copy_secret(instance, TRANSIENT)
        give_leaps(guest, transient)  # maps the page on which it starts
        assert stop_at(run_on(guest, guest.vcpu, Leap(slot=SLOT)), AT_GATE).index == TRANSIENT
        assert run_on(guest, other, transient) == []
        assert None not in left(guest)
        assert stolen(instance)
        guest.close()
        weak.close()


# ---- T25: a context of another VM ----------------------------------------------------------------

OTHERS_PAGE = crossing.IMAGE_OFFSET + 0xD_0000  # in the crossing area; free in the vault
OTHERS_SECRET = 0x07E4_5EC4_E700_0003
OWN_WINDOW = WINDOW + WINDOW_PAGES * PAGE_SIZE  # window of guest 1 in the sub context


class Neighbour:
    """Another VM, guest 0 of the object, with a context that also maps a page of its memory.

    The context has an ordinary page in place of the list, because it is meant for the list of
    `guest`, which is guest 1.
    """

    def __init__(self, kvm: Kvm, guest: BareGuest, instance: ObjectInstance) -> None:
        self.vm = BareGuest(kvm, Probe())
        self.vm.memory.write(layout.RX_LOG_GPA, OTHERS_SECRET.to_bytes(8, "little"))
        with MemoryFile("no list", PAGE_SIZE) as file:
            self._page = Region(file, 0, prefault=True)
        region = self.vm.memory.region_at(layout.RX_LOG_GPA)
        private = region.host_address + layout.RX_LOG_GPA - region.gpa
        self.weak = WeakAttachment(
            self.vm,
            instance,
            change_sub=self._replace_list,
            extra=[(OTHERS_PAGE, UserPages(private), Access.READ)],
        )
        guest.map_crossing(crossing_images())
        guest.announce(SLOT, instance.window_region(1, guest.next_window_gpa()))

    def _replace_list(self, plan: ContextPlan) -> None:
        at = plan.pages.index(ListPage())
        plan.pages[at] = UserPages(self._page.host_address)

    def close(self) -> None:
        self.vm.close()
        self.weak.close()
        self._page.close()


@pytest.fixture
def instance() -> Iterator[ObjectInstance]:
    with vault() as instance:
        yield instance


@pytest.fixture
def neighbour(kvm: Kvm, guest: BareGuest, instance: ObjectInstance) -> Iterator[Neighbour]:
    neighbour = Neighbour(kvm, guest, instance)
    yield neighbour
    guest.close()
    neighbour.close()


def copy_from_neighbour(guest: BareGuest, instance: ObjectInstance, slot: int) -> Leap:
    """Return a leap like `copy_secret`, from the other VM's page to the window of guest 1."""
    home_stack(guest)
    put(instance.window(1), 0x1000, C + instance.symbols["serve"] + 5)
    put(instance.window(1), 0x1008, layout.STACK_GPA + 0x800)
    return Leap(
        C + instance.symbols["vault_copy"],
        slot,
        {
            Register.RDI: OWN_WINDOW,
            Register.RSI: C + OTHERS_PAGE,
            Register.RSP: OWN_WINDOW + 0x1000,
        },
    )


@pytest.mark.attack("T25")
def test_a_context_of_another_vm(
    guest: BareGuest, instance: ObjectInstance, neighbour: Neighbour
) -> None:
    """The kernel refuses: the slot stays empty, and the guest stays in its context."""
    calls.set_slot(guest.vcpu, SLOT, None)  # creates a list, so that VMFUNC works
    assert refused(guest.vcpu, SLOT, neighbour.weak.sub)
    assert refused(guest.vcpu, SLOT, neighbour.weak.gate)
    give_leaps(guest, copy_from_neighbour(guest, instance, SLOT))
    assert failed(run(guest)) == [(0, SLOT)]
    assert word(instance.window(1)) == 0
    assert untouched(instance)


@pytest.mark.control("T25")
@pytest.mark.weakened
def test_a_context_of_another_vm_gives_its_memory_away(
    guest: BareGuest, instance: ObjectInstance, neighbour: Neighbour
) -> None:
    """A page of the other VM's memory reaches this guest's window."""
    with weakened(Weaken.OWNER):
        calls.set_slot(guest.vcpu, SLOT, neighbour.weak.sub)
        give_leaps(guest, copy_from_neighbour(guest, instance, SLOT))
        assert run(guest) == []
        assert None not in left(guest)
        assert word(instance.window(1)) == OTHERS_SECRET
        guest.close()  # the weakened kernel needs the other VM until then
