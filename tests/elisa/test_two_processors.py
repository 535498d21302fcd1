"""Contexts while two processors of the host are at work: each test needs both.

The vCPU's thread runs on one processor and the VMM's on the other. On the emulated host both run by
turns of a few instructions, so that each meets the other in the middle of everything.
"""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pykvm.elisa.calls import revoke_slot
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.kernel import uapi
from pykvm.kvm import Kvm, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.resources import GUEST_SOURCES
from tests.rigs.context_requests import Machine, close, good
from tests.rigs.host_state import nothing_stays, pinned_pages, quiet_kernel
from tests.rigs.probe import Probe, calls, give, prepare, probe_guest, results
from tests.rigs.several import give_each, guest_of, results_of
from tests.rigs.spinning import LONG, Spin, spin_object
from tests.rigs.tracefs import kprobes
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.elisa, pytest.mark.processors(2)]

VCPU, VMM = 0, 1
"""Processors of the two threads."""


@pytest.fixture(autouse=True)
def _on_its_own_processor() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {VMM})
    yield
    os.sched_setaffinity(0, before)


def start(guest: BareGuest, processor: int = VCPU, *, number: int = 0) -> int:
    """Start a vCPU of the guest on a processor; return the id of its thread."""
    # The thread takes over where this one may run.
    os.sched_setaffinity(0, {processor})
    try:
        guest.start(numbers=[number])
        return guest.threads.native_id(number)
    finally:
        os.sched_setaffinity(0, {VMM})


@contextmanager
def spinning() -> Iterator[tuple[ObjectInstance, Spin]]:
    with spin_object().open() as instance:
        spin = Spin(instance)
        yield instance, spin
        spin.forget()


@pytest.mark.attack("T22")
def test_both_processors_flush(machine: Machine) -> None:
    with kprobes("p:pykvm/flush kvm_intel:elisa_invept") as lines:
        close(good(machine).send(machine.vm))
    found = [match[1] for line in lines if (match := re.search(r"\[(\d+)\].* flush: ", line))]
    assert sorted(found) == ["000", "000", "001", "001"]  # before the first use, after the last


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "between calls"])
def test_revocation_from_the_other_processor(kvm: Kvm, inside: bool) -> None:
    """When the call returns, the vCPU has made its last turn in the object."""
    pause = random.Random(5)
    with probe_guest(kvm) as guest, spinning() as (instance, spin):
        instance.register(kvm)
        pinned = pinned_pages()
        for _ in range(20):
            attachment = instance.attach_vcpu(guest.vcpu, 0)
            give(guest, *(calls(attachment.slot, LONG if inside else 2000) for _ in range(400)))
            guest.start_vcpu(
                *(guest.vcpu, Probe().image().entry),
                *(layout.STACK_TOP_GPA, layout.BOOT_INFO_GPA),
            )
            begun = spin.begun
            start(guest)
            wait_for(lambda begun=begun: spin.begun > begun)  # type: ignore[misc]
            time.sleep(pause.random() * 0.005)
            revoke_slot(guest.vm, 0, attachment.slot)
            turns = spin.turns
            with pytest.raises(UnexpectedExitError) as caught:
                guest.wait(60)
            assert spin.turns == turns
            exit = caught.value.exit
            assert isinstance(exit, ElisaExit)
            causes = {uapi.lib.KVM_ELISA_EXIT_REVOKED, uapi.lib.KVM_ELISA_EXIT_VMFUNC}
            assert exit.cause in causes
            attachment.detach()
            assert pinned_pages() == pinned


def test_a_vcpu_that_moves(kvm: Kvm, counter: ObjectInstance) -> None:
    """The thread moves to and fro: its list, its contexts and its events go with it."""
    with probe_guest(kvm) as guest:
        slot = counter.attach(guest).slot
        give(guest, *(calls(slot, 1) for _ in range(400)))
        thread = start(guest)
        moves = 0
        while guest.info.result[0] < 400:
            moves += 1
            os.sched_setaffinity(thread, {moves % 2})
        assert guest.wait(60) == 0
        assert results(guest) == list(range(1, 401))
        assert moves > 10


def test_a_vcpu_that_moves_inside(kvm: Kvm) -> None:
    with probe_guest(kvm) as guest, spinning() as (instance, spin):
        slot = instance.attach(guest).slot
        give(guest, calls(slot, LONG))
        thread = start(guest)
        spin.wait_until_inside()
        for move in range(40):
            os.sched_setaffinity(thread, {move % 2})
            spin.work_on(100)
        spin.release()
        assert guest.wait(60) == 0
        assert results(guest)[0] is not None


def test_two_guests_in_one_object_at_once(kvm: Kvm) -> None:
    """Both are inside at the same time, each on a processor, and neither disturbs the other."""
    with (
        spinning() as (instance, spin),
        probe_guest(kvm) as first,
        BareGuest(kvm, Probe(), name="second") as second,
    ):
        prepare(second)
        for number, guest in enumerate((first, second)):
            slot = instance.attach(guest, number).slot
            give(guest, calls(slot, LONG))
        start(first, VCPU)
        start(second, VMM)
        wait_for(lambda: spin.begun == 2)
        spin.work_on()
        spin.release()
        assert first.wait(60) == 0
        assert second.wait(60) == 0
        assert None not in (results(first)[0], results(second)[0])


def test_two_vcpus_of_one_guest_at_once(kvm: Kvm) -> None:
    """Each is on a processor; every moment of a crossing meets every moment of the other's."""
    source = GUEST_SOURCES / "objects" / "counter.c"
    with SharedObject("counter", source, vcpus=2).open() as counter, guest_of(kvm, 2) as guest:
        slot = counter.attach(guest).slot
        give_each(guest, *[[calls(slot, 1) for _ in range(1000)]] * 2)
        start(guest, VCPU)
        start(guest, VMM, number=1)
        assert guest.wait(60) == 0
        answers = [results_of(guest, number) for number in (0, 1)]
        for each in answers:
            assert each == sorted(each)  # type: ignore[type-var]
        assert {*answers[0], *answers[1]} == set(range(1, 2001))
        assert answers != [list(range(1, 1001)), list(range(1001, 2001))]  # not one by one


def test_attaching_beside_a_guest_that_calls(kvm: Kvm, counter: ObjectInstance) -> None:
    """Contexts of the same object come and go while another guest is in it all the time."""
    with probe_guest(kvm) as caller, BareGuest(kvm, Probe(), name="other") as other:
        prepare(other)
        slot = counter.attach(caller, 0).slot
        give(caller, *(calls(slot, 1) for _ in range(2000)))
        start(caller)
        rounds = 0
        with quiet_kernel(), nothing_stays():
            while caller.info.result[0] < 2000 or rounds < 5:
                counter.attach_vcpu(other.vcpu, 1).detach()
                rounds += 1
        assert caller.wait(60) == 0
        assert results(caller) == list(range(1, 2001))
