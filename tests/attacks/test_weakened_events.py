"""T11, controls: events that KVM delivers in the middle of trusted code."""

from collections.abc import Callable, Iterator

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.attachment import Attachment
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Kvm, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.exceptions import GDT_AT, IDT_AT, TRAP_GATE, handler
from tests.rigs.attacks.objects import SLOW_DECLARATION
from tests.rigs.attacks.victim import (
    AT_SUB,
    SECRET,
    SHARED,
    WINDOW,
    WINDOW_PAGES,
    C,
    put,
    stolen,
    word,
)
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.interrupts import (
    ASSERT_LEVEL,
    EVENTS,
    INIT_DELIVERY,
    NMI,
    SELF_IPI,
    VECTOR,
    send_ipi,
    signal,
)
from tests.rigs.probe import Probe, Step, Table, What, calls, events_taken, give, results
from tests.rigs.processor_features import APICV, host_levels
from tests.rigs.smram import smram
from tests.rigs.spinning import event_guest
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]

# Offsets in struct slow.
BEGUN_AT, ENDED_AT, RELEASE_AT, TURNS_AT = 8, 16, 24, 32
IDT_SIZE, GDT_SIZE = 0x1000, 64
TRIPLE_FAULT = 2


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with event_guest(kvm) as guest:
        yield guest
    unblock_nmis(kvm)


def unblock_nmis(kvm: Kvm) -> None:
    """Run IRET in a guest, after an interrupt of its own.

    After a guest that ended with NMIs blocked, Bochs blocks them for all guests until one runs
    IRET.
    """
    with event_guest(kvm) as guest:
        give(guest, Step(What.WRITE_MSR, SELF_IPI, VECTOR), Step(What.WAIT, 1, 1 << 26))
        assert guest.run() == 0
        assert events_taken(guest) == 1


@pytest.fixture
def instance() -> Iterator[ObjectInstance]:
    with SLOW_DECLARATION.open() as instance:
        put(instance.shared, 0, SECRET)
        yield instance


def call_it(attachment: Attachment) -> Step:
    """Return a call whose arguments stay in registers, as `vault_copy` takes them."""
    return calls(attachment.slot, WINDOW, SHARED)


def let_in(guest: BareGuest, instance: ObjectInstance) -> None:
    """Start the guest, and wait until the object works."""
    guest.start(lambda mark: None if mark else tables_into_window(guest, instance))
    wait_for(lambda: word(instance.shared, TURNS_AT) > 0)


def tables_into_window(guest: BareGuest, instance: ObjectInstance) -> None:
    """Put the guest's own IDT, with handlers for these events, and its GDT into the window."""
    window = instance.window(0)
    at = Probe().image().address_of("interrupt_table")
    window[IDT_AT : IDT_AT + IDT_SIZE] = guest.memory.read(at, IDT_SIZE)
    for vector in (VECTOR, NMI):
        entry = handler(C + instance.symbols["vault_copy"], TRAP_GATE)
        window[IDT_AT + 16 * vector :][:16] = entry
    window[GDT_AT : GDT_AT + GDT_SIZE] = guest.memory.read(layout.GDT_GPA, GDT_SIZE)


def stopped(guest: BareGuest) -> ElisaExit:
    """Return the exit that ended the guest's run."""
    with pytest.raises(UnexpectedExitError) as caught:
        guest.wait(60)
    exit = caught.value.exit
    assert isinstance(exit, ElisaExit)
    return exit


@pytest.mark.control("T11")
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_runs_internal_code(guest: BareGuest, instance: ObjectInstance, name: str) -> None:
    """The event's handler is internal code with arguments of the guest's.

    The guest's descriptor tables are in its window; I8 is taken away as well.
    """
    _, inject = EVENTS[name]
    with weakened(Weaken.EVENTS | Weaken.TABLES):
        steal(guest, instance, inject)


@pytest.mark.control("T11")
@pytest.mark.processor(APICV)
def test_the_processor_delivers_an_interrupt_by_itself(kvm: Kvm, instance: ObjectInstance) -> None:
    """With APICv the processor itself delivers an interrupt that KVM holds back."""
    with (
        weakened(Weaken.APICV | Weaken.TABLES),
        event_guest(kvm, levels=host_levels()) as guest,
    ):
        steal(guest, instance, signal)


def steal(
    guest: BareGuest, instance: ObjectInstance, inject: Callable[[BareGuest], object]
) -> None:
    """Inject an event while the object works, and check that its handler copies the secret."""
    attachment = instance.attach(guest)
    guest.map(WINDOW, layout.WINDOW_GPA, WINDOW_PAGES * PAGE_SIZE, Access.READ | Access.WRITE)
    give(
        guest,
        Step(What.MARK, 0),
        Step(What.LOAD_TABLE, Table.IDT, WINDOW + IDT_AT, IDT_SIZE - 1),
        Step(What.LOAD_TABLE, Table.GDT, WINDOW + GDT_AT, GDT_SIZE - 1),
        call_it(attachment),
    )
    let_in(guest, instance)
    assert not stolen(instance)
    inject(guest)
    wait_for(lambda: stolen(instance))
    guest.stop()


@pytest.mark.control("T11")
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_ends_trusted_code(guest: BareGuest, instance: ObjectInstance, name: str) -> None:
    """With its tables elsewhere the guest loses the event, and the object its half-done call."""
    _, inject = EVENTS[name]
    with weakened(Weaken.EVENTS):
        give(guest, call_it(instance.attach(guest)))
        let_in(guest, instance)
        inject(guest)
        exit = stopped(guest)
        assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_REFUSED, AT_SUB)
        assert exit.vmx_exit_reason == TRIPLE_FAULT
        assert events_taken(guest) == 0
        assert (word(instance.shared, BEGUN_AT), word(instance.shared, ENDED_AT)) == (1, 0)


@pytest.mark.control("T11")
def test_init_ends_trusted_code(guest: BareGuest, instance: ObjectInstance) -> None:
    """The vCPU starts at its reset vector while the object's work is half done."""
    with weakened(Weaken.INIT):
        give(guest, call_it(instance.attach(guest)))
        let_in(guest, instance)
        send_ipi(guest, INIT_DELIVERY | ASSERT_LEVEL)
        with pytest.raises(Exception, match="the guest") as caught:
            guest.wait(60)
        assert not isinstance(caught.value, AssertionError)
        assert (word(instance.shared, BEGUN_AT), word(instance.shared, ENDED_AT)) == (1, 0)
        assert results(guest) == [None]
        sregs = guest.vcpu.get_sregs()
        assert (sregs.cr0 & 0x8000_0001, sregs.efer) == (0, 0)


@pytest.mark.control("T11")
def test_a_system_management_interrupt_saves_the_objects_state(
    guest: BareGuest, instance: ObjectInstance
) -> None:
    """The interrupt arrives in the object's code; the guest's handler can read the saved state."""
    with weakened(Weaken.INIT), smram(guest) as ram:
        give(guest, call_it(instance.attach(guest)))
        let_in(guest, instance)
        guest.stop()
        guest.vcpu.smi()
        guest.start()
        wait_for(lambda: ram.saved_rip != 0)
        assert C + crossing.IMAGE_OFFSET <= ram.saved_rip < C + crossing.SHARED_OFFSET
        assert (word(instance.shared, BEGUN_AT), word(instance.shared, ENDED_AT)) == (1, 0)
        guest.stop()
