"""Objects attached to guests with several vCPUs: all of them, or none."""

import errno
import os
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from pykvm.elisa import (
    GuestNumberError,
    SharedObject,
    SlotsFullError,
    SlotTakenError,
    TooManyVcpusError,
    VcpuAttachment,
    calls,
    crossing,
    vcpu_attachment,
)
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import build_object
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, Kvm, UnexpectedExitError, VcpuRunningError
from pykvm.machine.bare import layout
from pykvm.machine.bare.boot_info import ATTACHMENTS
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.failures import AttachmentsFullError
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import connect
from pykvm.measure.exit_counter import ExitCounter
from pykvm.measure.programs import SwitchPath
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.switch import SwitchConfig
from pykvm.switch.hosted import HostedSwitch
from tests.rigs.child import CAP_IPC_LOCK, in_child
from tests.rigs.host_state import host_state, locked_kib, nothing_stays, pinned_pages
from tests.rigs.messages import one_line
from tests.rigs.probe import WILD, Probe, Step, What, Wild, give, prepare, run
from tests.rigs.probe import calls as call
from tests.rigs.several import (
    Op,
    Several,
    give_each,
    guest_of,
    results_of,
    run_each,
    several_object,
    start_over,
    who,
)
from tests.rigs.sources import GUESTS, OBJECTS

COUNTER = GUEST_SOURCES / "objects" / "counter.c"
C = crossing.CROSSING_GVA
FIRST = uapi.lib.KVM_ELISA_SLOT_FIRST


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    """A guest with two vCPUs."""
    with guest_of(kvm, 2) as guest:
        yield guest


@pytest.fixture
def both(kvm: Kvm) -> Iterator[tuple[ObjectInstance, Several]]:
    with several_object() as both:
        yield both


def open_counter(vcpus: int) -> ObjectInstance:
    return SharedObject("counter", COUNTER, guests=2, vcpus=vcpus).open()


def numbers(memory: memoryview, count: int) -> list[int]:
    return list(memory[: 8 * count].cast("Q"))


@pytest.mark.unit
def test_objects_and_guests_are_built() -> None:
    """Building fills the cache for the emulated host."""
    assert "elisa_serve" in build_object([OBJECTS / "several.c"]).symbols
    assert Probe().image().entry == layout.IMAGE_GPA
    assert build_guest([GUESTS / "crew.c"]).entry == layout.IMAGE_GPA


# ---- one attachment for all ----------------------------------------------------------------------


@pytest.mark.elisa
def test_one_slot_that_is_free_on_all(kvm: Kvm, guest: BareGuest) -> None:
    with several_object() as (instance, _), open_counter(1) as counter:
        other = counter.attach_vcpu(guest.vcpus[1], 0)
        attachment = instance.attach(guest, 1)
        assert (other.slot, attachment.slot) == (FIRST, FIRST + 1)
        assert [each.slot for each in attachment.vcpus] == [FIRST + 1] * 2
        assert [each.vcpu for each in attachment.vcpus] == guest.vcpus
        # The number is one guest's, for all its vCPUs.
        with pytest.raises(GuestNumberError, match="attached already"):
            instance.attach_vcpu(guest.vcpus[1], 1)
        give_each(guest, *[[call(attachment.slot, Op.WHO, 9, 9)]] * 2)
        assert run_each(guest) == [[], []]
        assert [results_of(guest, n) for n in (0, 1)] == [[who(1, 2, 0)], [who(1, 2, 1)]]


@pytest.mark.elisa
def test_one_window_with_an_answer_for_each(kvm: Kvm, guest: BareGuest) -> None:
    """counter.c: vCPUs of two guests add at the same time."""
    with open_counter(2) as counter, guest_of(kvm, 2, name="other") as other:
        for each in (guest, other):
            slot = counter.attach(each).slot
            adds = [call(slot, 1) for _ in range(100)]
            reads = [Step(What.READ, layout.WINDOW_GPA + 8 * n) for n in (0, 1)]
            give_each(each, [*adds, reads[0]], [*adds, reads[1]])
            each.start()
        assert (guest.wait(60), other.wait(60)) == (0, 0)
        assert numbers(counter.shared, 1) == [400]
        seen: list[int | None] = []
        for number, each in enumerate((guest, other)):
            for vcpu in (0, 1):
                *answers, read = results_of(each, vcpu)
                assert numbers(counter.window(number), 2)[vcpu] == read == answers[-1]
                assert answers == sorted(answers)  # type: ignore[type-var]
                seen += answers
        assert sorted(seen) == list(range(1, 401))  # type: ignore[type-var]


@pytest.mark.elisa
def test_inside_at_the_same_time(guest: BareGuest, both: tuple[ObjectInstance, Several]) -> None:
    """Each has a stack of its own, at the same address, and what belongs to a vCPU has one user."""
    instance, several = both
    slot = instance.attach(guest).slot
    for op, expected in ((Op.STAY, [0, 0]), (Op.ADD_OWN, [5, 7])):
        several.hold()
        give_each(guest, [call(slot, op, 5)], [call(slot, op, 7)])
        start_over(guest)
        guest.start()
        several.wait_for(2)
        several.release()
        assert guest.wait(60) == 0
        assert [results_of(guest, n) for n in (0, 1)] == [[each] for each in expected]
    assert [several.own(0, vcpu) for vcpu in (0, 1)] == [5, 7]


@pytest.mark.elisa
def test_a_list_page_for_each(guest: BareGuest) -> None:
    """An object that reads its list finds the gate of the vCPU that called it."""
    unchecked = {Protection.CODE_CHECK}
    with SharedObject("wild", WILD, vcpus=2, without=unchecked).open() as wild:
        slot = wild.attach(guest).slot
        read = call(slot, Wild.READ, C + crossing.LIST_OFFSET + 8 * slot)
        give_each(guest, [read], [read])
        assert run_each(guest) == [[], []]
        ((first,), (second,)) = (results_of(guest, n) for n in (0, 1))
        assert first
        assert second
        assert first != second


@pytest.mark.elisa
def test_a_number_for_each_whatever_processor_the_vmm_is_on(guest: BareGuest) -> None:
    """CPUID has the APIC id of the vCPU, so that it can be set again from another processor."""
    processors = os.sched_getaffinity(0)
    give_each(guest, *[[Step(What.CPUID, 1, 0, 1)]] * 2)
    try:
        for processor in processors:
            os.sched_setaffinity(0, {processor})
            start_over(guest)
            assert run_each(guest) == [[], []]
            for number in (0, 1):
                (ebx,) = results_of(guest, number)
                assert ebx is not None
                assert ebx >> 24 == number
    finally:
        os.sched_setaffinity(0, processors)


@pytest.mark.elisa
def test_no_exit_on_either(guest: BareGuest) -> None:
    """Few exits are left, for first accesses to pages of the input."""
    with open_counter(2) as counter:
        slot = counter.attach(guest).slot
        steps = [Step(What.MARK, 0), *[call(slot, 1)] * 500, Step(What.MARK, 1)]
        give_each(guest, steps, steps)
        for vcpu in guest.vcpus:
            exits = ExitCounter(vcpu)
            assert run(guest, exits.mark, vcpu=vcpu) == []
            assert exits.parts[0].own < 20
        assert numbers(counter.shared, 1) == [1000]


@pytest.mark.elisa
def test_cost(kvm: Kvm, guest: BareGuest, both: tuple[ObjectInstance, Several]) -> None:
    """Each vCPU takes as many pages as a guest of one vCPU."""
    both[0].register(kvm)
    with BareGuest(kvm, Probe()) as single:
        before = pinned_pages()
        one = both[0].attach(single)
        pages = pinned_pages() - before
        two = both[0].attach(guest)
        assert pinned_pages() - before == 3 * pages
        assert one.cost == two.cost


# ---- added later ---------------------------------------------------------------------------------


@pytest.mark.elisa
def test_a_vcpu_added_later(kvm: Kvm) -> None:
    """It has the guest's objects at their slots, while the first vCPU works in one of them."""
    with (
        guest_of(kvm, 1) as guest,
        several_object() as (instance, several),
        open_counter(2) as counter,
        open_counter(1) as gone,
    ):
        gone.attach(guest).detach()  # it takes one vCPU, but it is not attached any more
        slots = [each.attach(guest).slot for each in (instance, counter)]
        second = [call(slots[0], Op.WHO), call(slots[1], 3)]
        give_each(guest, [call(slots[1], 2), call(slots[0], Op.STAY, 1)], second)
        guest.start()
        several.wait_for(1)
        guest.add_vcpu()
        guest.start(numbers=[1])
        assert guest.wait(60, numbers=[1]) == 0
        assert results_of(guest, 1) == [who(0, 2, 1), 5]
        assert numbers(counter.window(0), 2) == [2, 5]
        several.release()
        assert guest.wait(60) == 0
        assert results_of(guest, 0) == [2, 0]


@pytest.mark.elisa
def test_a_vcpu_that_cannot_be_attached(kvm: Kvm) -> None:
    """It has no object then, the first keeps its own, and the next try gets the same vCPU."""
    with guest_of(kvm, 1) as guest, open_counter(2) as one, open_counter(2) as other:
        slots = [each.attach(guest).slot for each in (one, other)]
        give_each(guest, *[[call(slot, 1) for slot in slots]] * 2)
        before = host_state()
        broken = mock.patch.object(VcpuAttachment, "_install", fails_at(2))
        with broken, pytest.raises(IoctlError):
            guest.add_vcpu()
        after = host_state()
        assert (after.pinned, after.locked) == (before.pinned, before.locked)
        assert len(guest.vcpus) == guest.info.vcpus == 1
        vcpu = guest.add_vcpu()
        assert (vcpu.id, guest.info.vcpus) == (1, 2)
        assert run_each(guest) == [[], []]
        assert numbers(one.shared, 1) == numbers(other.shared, 1) == [2]


def fails_at(count: int) -> Callable[..., None]:
    """Return a VcpuAttachment._install of which the last of `count` calls fails."""
    install = VcpuAttachment._install
    made = 0

    def body(*arguments: object) -> None:
        nonlocal made
        made += 1
        if made == count:
            raise IoctlError("KVM_ELISA_CREATE_CONTEXT", errno.ENOMEM, "")
        install(*arguments)  # type: ignore[arg-type]

    return body


@pytest.mark.elisa
def test_a_slot_that_is_taken(kvm: Kvm) -> None:
    with guest_of(kvm, 1) as guest, open_counter(2) as one, open_counter(1) as other:
        attachment = one.attach(guest)
        vcpu = guest.vm.create_vcpu(1)
        guest.start_vcpu(vcpu, Probe().image().entry, layout.stack_top(1), layout.BOOT_INFO_GPA)
        other.attach_vcpu(vcpu, 0)
        with nothing_stays(), pytest.raises(SlotTakenError, match="slot 2 of vcpu 1"):
            attachment.add_vcpu(vcpu)
        assert len(attachment.vcpus) == 1
        with pytest.raises(ValueError, match="not the last"):
            attachment.remove_vcpu(vcpu)
        attachment.detach()
        with pytest.raises(RuntimeError, match="attach it again"):
            attachment.add_vcpu(vcpu)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.elisa
@pytest.mark.attack("T37")
def test_a_guest_with_more_vcpus_than_the_object_takes(kvm: Kvm) -> None:
    with guest_of(kvm, 3) as guest, open_counter(2) as two, open_counter(1) as one, nothing_stays():
        for counter, takes in ((two, 2), (one, 1)):
            with pytest.raises(TooManyVcpusError) as caught:
                counter.attach(guest)
            assert one_line(caught.value) == (
                f"3 vcpus of a guest for counter 0, whose code may be entered by {takes}: "
                f"give the guest {takes}, or declare the object with vcpus=3 if its code allows"
            )


@pytest.mark.elisa
@pytest.mark.parametrize("path", SwitchPath)
def test_the_switch_takes_one(kvm: Kvm, guest: BareGuest, path: SwitchPath) -> None:
    """By whatever path it is called."""
    with HostedSwitch(SwitchConfig(ports=2)) as hosted:
        with nothing_stays(), pytest.raises(TooManyVcpusError, match="2 vcpus of a guest for sw"):
            connect(guest, hosted, 0, path)
        with BareGuest(kvm, Probe()) as single:
            connect(single, hosted, 0, path)


@pytest.mark.elisa
@pytest.mark.attack("T37")
def test_a_vcpu_more_than_the_object_takes(kvm: Kvm) -> None:
    with guest_of(kvm, 1) as guest, open_counter(2) as two, open_counter(1) as one:
        two.attach(guest)
        attachment = one.attach(guest)
        with nothing_stays(), pytest.raises(TooManyVcpusError, match="2 vcpus of a guest"):
            guest.add_vcpu()
        assert len(guest.vcpus) == 1
        attachment.detach()
        guest.add_vcpu()
        assert len(guest.vcpus) == 2


# ---- failures in the middle ----------------------------------------------------------------------


@pytest.mark.elisa
def test_no_slot_that_is_free_on_all(kvm: Kvm, guest: BareGuest) -> None:
    with (
        open_counter(2) as counter,
        several_object() as (instance, _),
        open_counter(2) as other,
        mock.patch.object(vcpu_attachment, "SLOTS", FIRST + 2),
    ):
        counter.attach_vcpu(guest.vcpus[0], 0)  # slot 2 of the first
        for number in (0, 1):  # slots 2 and 3 of the second
            instance.attach_vcpu(guest.vcpus[1], number)
        with nothing_stays(), pytest.raises(SlotsFullError) as caught:
            other.attach(guest)
        assert one_line(caught.value) == "no slot is free on vcpu 0, 1: detach an object"


@pytest.mark.elisa
def test_memory_that_may_be_locked_by_one_vcpu() -> None:
    """The limit is enough for the first vCPU; nothing is charged or attached afterwards."""

    def body() -> int:
        with Kvm() as kvm, guest_of(kvm, 2) as guest, open_counter(2) as counter:
            counter.attach_vcpu(guest.vcpu, 0).detach()
            registered = locked_kib()
            with pytest.raises(IoctlError) as caught:
                counter.attach(guest)
            assert caught.value.errno == errno.ENOMEM
            assert locked_kib() == registered
            slot = counter.attach_vcpu(guest.vcpu, 0).slot
            give_each(guest, [call(slot, 4)], [])
            assert run(guest) == []
            return numbers(counter.shared, 1)[0]

    with nothing_stays():
        assert in_child(body, without=CAP_IPC_LOCK, memlock=50 * PAGE_SIZE) == 4


@pytest.mark.elisa
def test_one_of_them_runs(guest: BareGuest, both: tuple[ObjectInstance, Several]) -> None:
    """Attaching needs all vCPUs at rest; the first does not keep the object."""
    with open_counter(2) as counter:
        slot = both[0].attach(guest).slot
        give_each(guest, [], [call(slot, Op.STAY, 1)])
        assert run(guest) == []
        guest.start(numbers=[1])
        both[1].wait_for(1)
        before = pinned_pages()
        with pytest.raises(VcpuRunningError):
            counter.attach(guest)
        assert pinned_pages() == before
        both[1].release()
        assert guest.wait(60) == 0
        assert counter.attach(guest).slot == slot + 1


@pytest.mark.elisa
def test_a_guest_that_does_not_join(guest: BareGuest) -> None:
    for _ in range(ATTACHMENTS):
        guest.announce(0, None)
    with open_counter(2) as counter, nothing_stays(), pytest.raises(AttachmentsFullError):
        counter.attach(guest)
    assert guest._attachments == []


# ---- taken away ----------------------------------------------------------------------------------


def stay(guest: BareGuest, instance: ObjectInstance, several: Several) -> int:
    """Start both vCPUs, and wait until they are inside; return the slot."""
    slot = instance.attach(guest).slot
    give_each(guest, *[[call(slot, Op.STAY, 1), Step(What.VMFUNC, 0, slot)]] * 2)
    guest.start()
    several.wait_for(2)
    return slot


def told(guest: BareGuest, number: int) -> ElisaExit:
    """Return the exit that ended the run of a started vCPU."""
    with pytest.raises(UnexpectedExitError) as caught:
        guest.wait(60, numbers=[number])
    assert isinstance(caught.value.exit, ElisaExit)
    return caught.value.exit


@pytest.mark.elisa
@pytest.mark.parametrize("how", ["revoke", "close"])
def test_revoked_while_both_are_inside(
    kvm: Kvm, guest: BareGuest, both: tuple[ObjectInstance, Several], how: str
) -> None:
    """Both stop, the pages come back, and another guest of the object goes on."""
    instance, several = both
    instance.register(kvm)
    before = pinned_pages(), locked_kib()
    with BareGuest(kvm, Probe(), name="other") as other:
        prepare(other)
        stay(guest, instance, several)
        (attachment,) = guest._attachments
        used = pinned_pages()
        give(other, call(instance.attach(other).slot, Op.STAY, 2))
        other.start()
        several.wait_for(3)
        getattr(attachment, how)()
        assert not attachment.attached
        for number in (0, 1):
            exit = told(guest, number)
            assert (exit.cause, exit.slot) == (
                uapi.lib.KVM_ELISA_EXIT_REVOKED,
                attachment.slot,
            )
        attachment.revoke()  # harmless
        assert pinned_pages() < used
        several.release()
        assert other.wait(60) == 0
    assert (pinned_pages(), locked_kib()) == before


@pytest.mark.elisa
def test_revoked_from_all_but_one(guest: BareGuest, both: tuple[ObjectInstance, Several]) -> None:
    """The call for the first fails: the second stops all the same. The next call is for both."""
    slot = stay(guest, *both)
    (attachment,) = guest._attachments
    revoke = calls.revoke_slot

    def fails(vm: object, vcpu: int, slot: int) -> None:
        if vcpu == 0:
            raise IoctlError("KVM_ELISA_REVOKE", errno.EPERM, "")
        revoke(vm, vcpu, slot)  # type: ignore[arg-type]

    with mock.patch.object(calls, "revoke_slot", fails), pytest.raises(IoctlError):
        attachment.revoke()
    assert told(guest, 1).cause == uapi.lib.KVM_ELISA_EXIT_REVOKED
    assert [each.attached for each in attachment.vcpus] == [True, False]
    assert attachment.attached
    with pytest.raises(GuestNumberError, match="attached already"):  # its window is in use
        both[0].attach_vcpu(guest.vcpus[1], 0)
    attachment.revoke()
    assert not attachment.attached
    assert told(guest, 0).cause == uapi.lib.KVM_ELISA_EXIT_REVOKED
    assert both[0].attach(guest, 0).slot == slot


@pytest.mark.elisa
def test_detached_while_one_runs(guest: BareGuest, both: tuple[ObjectInstance, Several]) -> None:
    """The one at rest loses the object, the other when it is back."""
    instance, several = both
    slot = instance.attach(guest).slot
    (attachment,) = guest._attachments
    give_each(guest, [Step(What.MARK), Step(What.VMFUNC, 0, slot)], [call(slot, Op.STAY, 1)])

    def on_mark(_: int) -> None:
        several.wait_for(1)
        with pytest.raises(VcpuRunningError):
            attachment.detach()
        assert [each.attached for each in attachment.vcpus] == [False, True]
        assert attachment.attached
        guest.add_vcpu()  # a third one would be too many, but it does not get the object any more
        assert len(attachment.vcpus) == 2
        with pytest.raises(RuntimeError, match="attach it again"):
            attachment.add_vcpu(guest.vcpus[2])

    guest.start(numbers=[1])  # it waits for the first
    exits = run(guest, on_mark)
    assert [exit.index for exit in exits if isinstance(exit, ElisaExit)] == [slot]
    with pytest.raises(GuestNumberError, match="attached already"):
        instance.attach_vcpu(guest.vcpu, 0)
    several.release()
    assert guest.wait(60) == 0
    assert results_of(guest, 1) == [0]
    attachment.detach()
    attachment.detach()  # harmless
    assert not attachment.attached
    assert instance.attach_vcpu(guest.vcpus[2], 0).slot == FIRST
    with pytest.raises(TooManyVcpusError):
        instance.attach(guest)
