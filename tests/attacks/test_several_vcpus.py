"""T37: a second vCPU of the same guest, while the first one is in the object."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from pykvm.elisa import SharedObject, VcpuAttachment, calls, crossing
from pykvm.elisa.contexts import ContextPlan
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.protections import Protection
from pykvm.elisa.vcpu_attachment import AttachmentParts
from pykvm.kernel import uapi
from pykvm.kvm import IoctlError, Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.resources import GUEST_SOURCES
from tests.rigs.attacks.vault_calls import failed
from tests.rigs.probe import WILD, Step, What, Wild
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
)

pytestmark = pytest.mark.elisa

TRANSIENT = uapi.lib.KVM_ELISA_SLOT_TRANSIENT
LIST = crossing.CROSSING_GVA + crossing.LIST_OFFSET
UNUSED = 100  # a slot
CALLS = 300
COUNTER = SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c", vcpus=2)
RECKLESS = SharedObject("wild", WILD, vcpus=2, without={Protection.CODE_CHECK})


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    """A guest with two vCPUs, the second of which is hostile."""
    with guest_of(kvm, 2) as guest:
        yield guest


@pytest.fixture
def both() -> Iterator[tuple[ObjectInstance, Several]]:
    with several_object() as both:
        yield both


# ---- the stack -----------------------------------------------------------------------------------


def meet(guest: BareGuest, slot: int, several: Several) -> list[int | None]:
    """Let both vCPUs stay inside, with other words on the stack; return how many changed."""
    give_each(guest, [call(slot, Op.STAY, 1)], [call(slot, Op.STAY, 2)])
    guest.start()
    several.wait_for(2)
    several.release()
    assert guest.wait(60) == 0
    return results_of(guest, 0) + results_of(guest, 1)


@pytest.mark.attack("T37")
def test_a_stack_at_the_same_address(
    guest: BareGuest, both: tuple[ObjectInstance, Several]
) -> None:
    """The second vCPU fills its stack again and again while the first is inside."""
    instance, several = both
    slot = instance.attach(guest).slot
    assert meet(guest, slot, several) == [0, 0]
    several.hold()
    start_over(guest)
    fill = [call(slot, Op.STAY, 0xF111, 1)] * 100
    give_each(guest, [call(slot, Op.STAY, 1)], fill)
    guest.start()
    several.wait_for(1)
    assert guest.wait(60, numbers=[1]) == 0
    several.release()
    assert guest.wait(60) == 0
    assert results_of(guest, 0) == [0]
    assert results_of(guest, 1) == [0] * 100


@contextmanager
def one_stack() -> Iterator[None]:
    """Give all vCPUs that are attached meanwhile the stack of the first."""
    plan_sub = AttachmentParts.plan_sub
    stacks: list[int] = []

    def body(parts: AttachmentParts, env_page: int, stack: int) -> ContextPlan:
        if stack:  # the plan is a real one
            stacks.append(stack)
            stack = stacks[0]
        return plan_sub(parts, env_page, stack)

    with mock.patch.object(AttachmentParts, "plan_sub", body):
        yield


@pytest.mark.control("T37")
def test_a_stack_that_vcpus_share_is_overwritten(
    guest: BareGuest, both: tuple[ObjectInstance, Several]
) -> None:
    with one_stack():
        slot = both[0].attach(guest).slot
    assert any(meet(guest, slot, both[1]))


# ---- memory with one writer ----------------------------------------------------------------------


@pytest.mark.control("T37")
def test_an_object_for_one_vcpu_that_two_enter(
    guest: BareGuest, both: tuple[ObjectInstance, Several]
) -> None:
    """The declaration says two, but the code adds as if it were alone: an addition is lost."""
    instance, several = both
    slot = instance.attach(guest).slot
    give_each(guest, [call(slot, Op.ADD, 10)], [call(slot, Op.ADD, 1)])
    guest.start()
    several.wait_for(2)
    several.release()
    assert guest.wait(60) == 0
    assert several.sum in (10, 1)


# ---- the list ------------------------------------------------------------------------------------


@pytest.mark.attack("T37")
def test_the_transient_slot_while_a_sibling_fills_its_own(guest: BareGuest) -> None:
    """The second vCPU finds its slot empty at any moment of the first one's calls."""
    with COUNTER.open() as counter:
        slot = counter.attach(guest).slot
        stray = [Step(What.VMFUNC, 0, TRANSIENT)]
        give_each(guest, [call(slot, 1) for _ in range(CALLS)], stray * (CALLS // 2))
        honest, hostile = run_each(guest)
        assert honest == []
        assert failed(hostile) == [(0, TRANSIENT)] * (CALLS // 2)
        assert results_of(guest, 0) == list(range(1, CALLS + 1))


@pytest.mark.attack("T37")
def test_a_list_that_a_sibling_writes_to(guest: BareGuest) -> None:
    """A reckless object writes to the second vCPU's list for it; the first one's stays as it is."""
    with RECKLESS.open() as wild:
        slot = wild.attach(guest).slot
        give_each(guest, [], [call(slot, Wild.READ, LIST + 8 * slot)])
        assert run_each(guest) == [[], []]
        (gate,) = results_of(guest, 1)
        assert gate
        start_over(guest)
        write = call(slot, Wild.WRITE, LIST + 8 * UNUSED, gate)
        give_each(guest, [], [write, call(UNUSED, Wild.HELLO)])
        assert run_each(guest) == [[], []]
        assert results_of(guest, 1) == [0, 1000]  # its own list leads there now
        start_over(guest)
        give_each(guest, [Step(What.VMFUNC, 0, UNUSED), call(slot, Wild.HELLO)])
        exits, _ = run_each(guest)
        assert failed(exits) == [(0, UNUSED)]
        assert results_of(guest, 0)[1] == 1000


def contexts(one: VcpuAttachment) -> list[calls.Context]:
    """Return sub and gate context."""
    return list(one._contexts)


@pytest.mark.attack("T37")
def test_a_siblings_gate(guest: BareGuest) -> None:
    """The kernel takes neither context of one vCPU for the other, whose slots stay empty."""
    with COUNTER.open() as counter:
        attachment = counter.attach(guest)
        first, second = attachment.vcpus
        for own, other in ((first, second), (second, first)):
            for context in contexts(own):
                with pytest.raises(IoctlError) as caught:
                    calls.set_slot(other.vcpu, UNUSED, context)
                assert caught.value.errno == errno.EINVAL
        steps = [Step(What.VMFUNC, 0, UNUSED), call(attachment.slot, 1)]
        give_each(guest, steps, steps)
        for exits in run_each(guest):
            assert failed(exits) == [(0, UNUSED)]
        assert sorted([results_of(guest, n)[1] for n in (0, 1)]) == [1, 2]  # type: ignore[type-var]


# ---- the window ----------------------------------------------------------------------------------


@pytest.mark.attack("T37")
def test_a_window_that_a_sibling_changes_during_the_call(guest: BareGuest) -> None:
    """The object's answers are what it counts, whatever is in the window."""
    with COUNTER.open() as counter:
        slot = counter.attach(guest).slot
        junk = [Step(What.WRITE, layout.WINDOW_GPA, 0xBAD << 48 | n) for n in range(5 * CALLS)]
        give_each(guest, [call(slot, 1) for _ in range(CALLS)], junk)
        assert run_each(guest) == [[], []]
        assert results_of(guest, 0) == list(range(1, CALLS + 1))
        assert int.from_bytes(counter.shared[:8], "little") == CALLS
