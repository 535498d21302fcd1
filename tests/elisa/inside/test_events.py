"""I6: interrupts, NMIs and INIT wait while a vCPU is outside its default context.

They are taken at the return page, once each, and disturb nothing.
"""

from collections.abc import Callable

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import Kvm, Stats
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.interrupts import (
    ASSERT_LEVEL,
    EVENTS,
    INIT_DELIVERY,
    NMI,
    NMI_DELIVERY,
    SELF_IPI,
    VECTOR,
    send_ipi,
    signal,
)
from tests.rigs.probe import (
    Event,
    Probe,
    Step,
    What,
    calls,
    events,
    events_taken,
    give,
    prepare,
    results,
)
from tests.rigs.processor_features import APICV, host_levels
from tests.rigs.spinning import (
    CROSSING_AREA,
    ENTRY_PAGE,
    LONG,
    RETURN_PAGE,
    Spin,
    crossing_with_sti,
    event_guest,
)

pytestmark = pytest.mark.elisa

SHORT = 1000  # turns: with interrupts off, the emulated host has to wait


class Counted:
    """The vCPU's statistics, as differences from the time of construction."""

    def __init__(self, guest: BareGuest) -> None:
        self._stats: Stats = guest.vcpu.stats()
        self._names = ("elisa_held", "elisa_returns", "elisa_exits", "elisa_bad_vmfunc")
        self._before = self._read()

    def _read(self) -> dict[str, int]:
        return {
            name: self._stats.value(name) if name in self._stats.names() else 0
            for name in self._names
        }

    def since(self) -> dict[str, int]:
        return {name: value - self._before[name] for name, value in self._read().items()}


def check_at_return(event: Event, vector: int) -> None:
    """Check that the event was taken at the return page's first instruction.

    There the vCPU is in its default context.
    """
    assert event.vector == vector
    assert event.rip == RETURN_PAGE, hex(event.rip)
    assert layout.STACK_GPA <= event.rsp < layout.STACK_TOP_GPA, hex(event.rsp)


def held_while_inside(
    guest: BareGuest, instance: ObjectInstance, inject: Callable[[], object]
) -> list[Event]:
    """Call the object, inject something while it works, and let it finish a while later.

    Returns:
        The events that the guest took; it took none before the end.
    """
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG), calls(slot, 7))
    counted = Counted(guest)
    spin = Spin(instance)
    guest.start()
    try:
        spin.wait_until_inside()
        inject()
        spin.work_on()
        assert events_taken(guest) == 0
    finally:
        turns = spin.turns
        spin.release()
    assert guest.wait(60) == 0
    first, second = results(guest)
    assert first is not None
    assert first >= turns
    assert second == 0  # released: the second call finds no work
    assert (spin.begun, spin.ended) == (2, 2)
    since = counted.since()
    assert since["elisa_held"] >= 1
    assert since["elisa_returns"] == 1
    assert (since["elisa_exits"], since["elisa_bad_vmfunc"]) == (0, 0)
    return events(guest)


# ---- one event, while the object works -----------------------------------------------------------


@pytest.mark.attack("T11")
@pytest.mark.parametrize("name", EVENTS)
def test_an_event(guest: BareGuest, instance: ObjectInstance, name: str) -> None:
    vector, inject = EVENTS[name]
    (event,) = held_while_inside(guest, instance, lambda: inject(guest))
    check_at_return(event, vector)


@pytest.mark.attack("T11")
@pytest.mark.processor(APICV)
def test_an_interrupt_that_could_be_posted(kvm: Kvm, instance: ObjectInstance) -> None:
    """APICv, with which a processor delivers interrupts by itself, is off for VMs with contexts."""
    with event_guest(kvm, levels=host_levels()) as guest:
        (event,) = held_while_inside(guest, instance, lambda: signal(guest))
        check_at_return(event, VECTOR)


def test_several_at_once(guest: BareGuest, instance: ObjectInstance) -> None:
    """One return is trapped, and then each event is taken in the order of priority.

    The NMI comes first, then the interrupts by vector (SDM vol. 3A, table 6-2). The same vector
    twice is one interrupt.
    """

    def inject() -> None:
        for data in (0x41, 0x71, NMI_DELIVERY, 0x61, 0x71):
            signal(guest, data)

    taken = held_while_inside(guest, instance, inject)
    assert [event.vector for event in taken] == [NMI, 0x71, 0x61, 0x41]
    assert taken[1].rip == RETURN_PAGE
    assert not [event for event in taken if event.rip in CROSSING_AREA and event.rip != RETURN_PAGE]


@pytest.mark.attack("T11")
def test_the_timer(guest: BareGuest, instance: ObjectInstance) -> None:
    """The guest's own local APIC timer, armed before the call, needs no action of the host."""
    slot = instance.attach(guest).slot
    give(
        guest,
        Step(What.ARM_TIMER, 100_000, VECTOR),
        calls(slot, 200_000),
        Step(What.TIME),
        Step(What.WAIT, 1, 1 << 26),
    )
    counted = Counted(guest)
    guest.start()
    assert guest.wait(60) == 0
    deadline, turns, back, _ = results(guest)
    assert turns == 200_000
    (event,) = events(guest)
    check_at_return(event, VECTOR)
    assert deadline is not None
    assert back is not None
    assert deadline < event.time < back
    assert counted.since()["elisa_returns"] == 1


@pytest.mark.attack("T11")
def test_init(guest: BareGuest, instance: ObjectInstance) -> None:
    """INIT resets the vCPU after the object's work, not in the middle of it."""
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG))
    counted = Counted(guest)
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    send_ipi(guest, INIT_DELIVERY | ASSERT_LEVEL)
    spin.work_on()
    spin.release()
    # The first vCPU starts at its reset vector (SDM vol. 3A 9.1.4), where this guest has no code.
    with pytest.raises(Exception, match="the guest") as caught:
        guest.wait(60)
    assert not isinstance(caught.value, AssertionError)
    assert (spin.begun, spin.ended) == (1, 1)
    assert results(guest) == [None]
    sregs = guest.vcpu.get_sregs()
    assert (sregs.cr0 & 0x8000_0001, sregs.efer) == (0, 0)
    assert counted.since()["elisa_returns"] == 1


# ---- events pending before the call --------------------------------------------------------------


def test_pending_with_interrupts_off(guest: BareGuest, instance: ObjectInstance) -> None:
    """The call neither takes nor loses the event; the guest's own STI takes it."""
    slot = instance.attach(guest).slot
    give(
        guest,
        Step(What.INTERRUPTS, 0),
        Step(What.WRITE_MSR, SELF_IPI, VECTOR),
        calls(slot, SHORT),
        Step(What.TIME),
        Step(What.INTERRUPTS, 1),
        Step(What.TIME),
    )
    guest.start()
    assert guest.wait(60) == 0
    _, _, turns, before, _, after = results(guest)
    assert turns == SHORT
    (event,) = events(guest)
    assert event.vector == VECTOR
    assert event.rip not in CROSSING_AREA
    assert before is not None
    assert after is not None
    assert before < event.time < after


@pytest.mark.attack("T11")
def test_interrupts_on_with_the_last_instruction(kvm: Kvm, instance: ObjectInstance) -> None:
    """After STI the interrupt would be taken after the next instruction: VMFUNC, so in the gate."""
    with BareGuest(kvm, Probe(events=True), irqchip=True) as guest:
        slot = instance.attach(guest).slot
        guest.map_crossing(crossing_with_sti())
        give(
            guest,
            Step(What.INTERRUPTS, 0),
            Step(What.WRITE_MSR, SELF_IPI, VECTOR),
            calls(slot, SHORT),
            Step(What.INTERRUPTS, 1),
        )
        counted = Counted(guest)
        guest.start()
        assert guest.wait(60) == 0
        assert results(guest)[2] == SHORT
        (event,) = events(guest)
        check_at_return(event, VECTOR)
        assert counted.since()["elisa_returns"] == 1


def test_an_nmi_before_the_vcpu_goes_on_inside(guest: BareGuest, instance: ObjectInstance) -> None:
    """The vCPU stops inside, gets an NMI (KVM_NMI) and an interrupt, and runs on."""
    slot = instance.attach(guest).slot
    give(guest, calls(slot, LONG))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    guest.stop()
    assert spin.inside
    guest.vcpu.nmi()
    signal(guest)
    guest.start()
    spin.work_on()
    assert events_taken(guest) == 0
    spin.release()
    assert guest.wait(60) == 0
    taken = events(guest)
    assert [event.vector for event in taken] == [NMI, VECTOR]
    check_at_return(taken[0], NMI)
    assert taken[1].rip not in CROSSING_AREA or taken[1].rip == RETURN_PAGE


def test_events_outside_a_call_are_not_held(guest: BareGuest, instance: ObjectInstance) -> None:
    """In its default context a vCPU with a list takes events as any other vCPU does."""
    slot = instance.attach(guest).slot
    give(
        guest,
        calls(slot, 5),
        Step(What.WRITE_MSR, SELF_IPI, VECTOR),
        Step(What.WAIT, 1, 1 << 26),
        Step(What.ARM_TIMER, 1000, VECTOR + 1),
        Step(What.HALT, 2),
        calls(slot, 6),
    )
    counted = Counted(guest)
    guest.start()
    assert guest.wait(60) == 0
    assert [event.vector for event in events(guest)] == [VECTOR, VECTOR + 1]
    assert not [event for event in events(guest) if event.rip in CROSSING_AREA]
    assert (results(guest)[0], results(guest)[5]) == (5, 6)
    since = counted.since()
    assert (since["elisa_held"], since["elisa_returns"]) == (0, 0)


@pytest.mark.attack("T11")
def test_many_events_and_calls(guest: BareGuest, instance: ObjectInstance) -> None:
    """A timer interrupt arrives at some point of each of many crossings and is taken once.

    In the crossing area it is taken only on the entry page, which is the guest's own, or before the
    return page's first instruction.
    """
    slot = instance.attach(guest).slot
    rounds = 60
    steps = []
    for number in range(rounds):
        steps += [
            Step(What.ARM_TIMER, 4000 + 37 * number, VECTOR),
            calls(slot, 300),
            calls(slot, 300),
            calls(slot, 300),
            Step(What.WAIT, number + 1, 1 << 26),
        ]
    give(guest, *steps)
    counted = Counted(guest)
    guest.start()
    assert guest.wait(120) == 0
    taken = events(guest)
    assert [event.vector for event in taken] == [VECTOR] * rounds
    inside = [
        event for event in taken if event.rip in CROSSING_AREA and event.rip not in ENTRY_PAGE
    ]
    assert {event.rip for event in inside} <= {RETURN_PAGE}
    # Some must have arrived while the object worked.
    assert len(inside) >= rounds // 10
    assert counted.since()["elisa_returns"] >= len(inside) // 2
    assert results(guest)[1::5] == [300] * rounds


def test_a_guest_without_events_is_not_slowed(kvm: Kvm, instance: ObjectInstance) -> None:
    """Without events a crossing causes no exit: nothing is armed."""
    with BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        slot = instance.attach(guest).slot
        give(guest, *(calls(slot, 10) for _ in range(50)))
        counted = Counted(guest)
        guest.start()
        assert guest.wait(60) == 0
        assert set(counted.since().values()) == {0}
