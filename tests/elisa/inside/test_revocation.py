"""Revocation of contexts from a vCPU: in user space, running, halted, or inside the object."""

import errno
import os
import time

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.calls import revoke_slot
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Exit, IoctlError, Kvm, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.child import CAP_SYS_ADMIN, in_child
from tests.rigs.context_requests import Machine, good, revoke, set_slot
from tests.rigs.host_state import host_state, locked_kib, nothing_stays, pinned_pages
from tests.rigs.interrupts import signal
from tests.rigs.probe import (
    Probe,
    Step,
    What,
    calls,
    events_taken,
    give,
    prepare,
    results,
    run,
)
from tests.rigs.spinning import LONG, C, Spin, event_guest, spin_object
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.elisa

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))


def start_over(guest: BareGuest, *steps: Step) -> None:
    """Restart the guest's program, as a VMM may after it has stopped the guest for good."""
    give(guest, *steps)
    sregs = guest.vcpu.get_sregs()
    guest.start_vcpu(guest.vcpu, Probe().image().entry, layout.STACK_TOP_GPA, layout.BOOT_INFO_GPA)
    assert guest.vcpu.get_sregs().cr3 == sregs.cr3


def told(guest: BareGuest) -> ElisaExit:
    """Return the exit at which a started guest stopped."""
    with pytest.raises(UnexpectedExitError) as caught:
        guest.wait(60)
    exit = caught.value.exit
    assert isinstance(exit, ElisaExit), exit
    return exit


def check_revoked(exit: Exit, slot: int) -> None:
    assert isinstance(exit, ElisaExit), exit
    assert (exit.cause, exit.at, exit.slot) == (
        uapi.lib.KVM_ELISA_EXIT_REVOKED,
        uapi.lib.KVM_ELISA_AT_SUB,
        slot,
    )
    assert C < exit.rip < C + crossing.SHARED_OFFSET
    assert "revoked context in the sub context" in str(exit)


def check_refused(exit: Exit, slot: int) -> None:
    assert isinstance(exit, ElisaExit), exit
    assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, uapi.lib.KVM_ELISA_AT_DEFAULT)
    assert exit.index == slot


# ---- the call ------------------------------------------------------------------------------------


def test_slots(machine: Machine) -> None:
    """Revocation empties the named slots only, and reports an empty slot."""
    vm, vcpu = machine.vm, machine.vcpu
    with nothing_stays() as before:
        first, second = good(machine).send(vm), good(machine).send(vm)
        for slot, fd in ((2, first), (3, first), (511, second)):
            assert set_slot(vcpu, slot, fd) == 0
        for fd in (first, second):
            os.close(fd)
        assert revoke(vm, 0, 2) == 0
        assert revoke(vm, 0, 2) == -errno.ENOENT
        assert host_state().pinned == before.pinned + 6
        assert revoke(vm, 0, 3) == 0
        assert host_state().pinned == before.pinned + 3
        assert revoke(vm, 0, 511) == 0
        assert revoke(vm, 0, 0) in (0, -errno.ENOENT)


def test_all_slots(machine: Machine) -> None:
    with nothing_stays() as before:
        for slot in (2, 7, 511):
            fd = good(machine).send(machine.vm)
            assert set_slot(machine.vcpu, slot, fd) == 0
            os.close(fd)
        assert host_state().pinned == before.pinned + 9
        revoke_slot(machine.vm, 0, None)
        assert host_state().pinned == before.pinned
        for slot in (2, 7, 511):
            assert revoke(machine.vm, 0, slot) == -errno.ENOENT


def test_refusals(machine: Machine) -> None:
    with nothing_stays():
        fd = good(machine).send(machine.vm)
        assert revoke(machine.vm, 0, 2) == -errno.ENOENT  # no list yet
        assert set_slot(machine.vcpu, 2, fd) == 0
        assert revoke(machine.vm, 1, 2) == -errno.ENOENT
        for vcpu_id in (2**31, 2**32 - 1):
            assert revoke(machine.vm, vcpu_id, 2) == -errno.EINVAL
        for slot in (1, 512, 2**32 - 1):
            assert revoke(machine.vm, 0, slot) == -errno.EINVAL
        assert in_child(lambda: revoke(machine.vm, 0, 2)) == -errno.EIO
        assert revoke(machine.vm, 0, 2) == 0
        os.close(fd)


def test_without_sys_admin(machine: Machine) -> None:
    """The permission is checked first, so that the call reveals nothing."""
    assert in_child(lambda: _own_revoke(2), without=CAP_SYS_ADMIN) == -errno.EPERM


def _own_revoke(slot: int) -> int:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_vcpu(0)
        return revoke(vm, 0, slot)


def test_the_error_says_what_to_do(machine: Machine) -> None:
    with pytest.raises(IoctlError, match="a slot that holds a context") as caught:
        revoke_slot(machine.vm, 0, 2)
    assert caught.value.errno == errno.ENOENT


# ---- a vCPU outside the object -------------------------------------------------------------------


def test_in_user_space(guest: BareGuest, instance: ObjectInstance) -> None:
    """The guest waits at a mark. Its other object stays attached."""
    first = instance.attach(guest, 0)
    second = instance.attach(guest, 1)

    def on_mark(_: int) -> None:
        revoke_slot(guest.vm, 0, first.slot)

    give(
        guest,
        calls(first.slot, 3),
        Step(What.MARK),
        Step(What.VMFUNC, 0, first.slot),
        calls(second.slot, 4),
    )
    (exit,) = run(guest, on_mark)
    check_refused(exit, first.slot)
    assert (results(guest)[0], results(guest)[3]) == (3, 4)


def test_while_the_guest_runs(guest: BareGuest, instance: ObjectInstance) -> None:
    """The guest runs on in its default context and fails at its next VMFUNC."""
    attachment = instance.attach(guest)
    give(
        guest,
        calls(attachment.slot, 3),
        Step(What.WAIT, 1, 1 << 40),
        Step(What.VMFUNC, 0, attachment.slot),
    )
    guest.start()
    wait_for(lambda: guest.info.result[0] == 1)
    revoke_slot(guest.vm, 0, attachment.slot)
    signal(guest)
    check_refused(told(guest), attachment.slot)
    assert results(guest)[:2] != [3, None]


def test_halted(guest: BareGuest, instance: ObjectInstance) -> None:
    """A halted vCPU sleeps on; when an interrupt wakes it, its slot is empty."""
    attachment = instance.attach(guest)
    give(
        guest,
        calls(attachment.slot, 3),
        Step(What.HALT, 1),
        Step(What.VMFUNC, 0, attachment.slot),
    )
    stats = guest.vcpu.stats()
    guest.start()
    wait_for(lambda: guest.info.result[0] == 1)
    wait_for(lambda: stats.value("blocking"))
    revoke_slot(guest.vm, 0, attachment.slot)
    assert events_taken(guest) == 0
    signal(guest)
    check_refused(told(guest), attachment.slot)
    assert events_taken(guest) == 1


# ---- a vCPU inside the object --------------------------------------------------------------------


def test_inside(guest: BareGuest, instance: ObjectInstance) -> None:
    """The vCPU stops at once, and no code of the object runs any more.

    Its registers hold nothing of the object's. The guest can be started over and attached again.
    """
    attachment = instance.attach(guest)
    give(guest, calls(attachment.slot, LONG))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    revoke_slot(guest.vm, 0, attachment.slot)
    turns = spin.turns
    exit = told(guest)
    check_revoked(exit, attachment.slot)
    assert spin.turns == turns
    regs = guest.vcpu.get_regs()
    assert {name: getattr(regs, name) for name in GENERAL} == dict.fromkeys(GENERAL, 0)
    assert spin.inside
    attachment.detach()

    spin.release()
    again = instance.attach_vcpu(guest.vcpu, 0).slot
    start_over(guest, calls(again, 1), Step(What.READ, layout.GDT_GPA + 8))
    assert run(guest) == []
    assert results(guest) == [0, 0x00AF_9B00_0000_FFFF]
    assert spin.begun == 2


def test_stopped_inside(guest: BareGuest, instance: ObjectInstance) -> None:
    """The vCPU is in user space, inside the object: the next run reports it and does nothing."""
    attachment = instance.attach(guest)
    give(guest, calls(attachment.slot, LONG))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    guest.stop()
    turns = spin.turns
    revoke_slot(guest.vm, 0, attachment.slot)
    check_revoked(guest.vcpu.run(), attachment.slot)
    assert spin.turns == turns
    attachment.detach()


def test_another_slot_while_inside(guest: BareGuest, instance: ObjectInstance) -> None:
    """The vCPU is in an object other than the revoked one, and is not disturbed."""
    inside = instance.attach(guest, 0)
    other = instance.attach(guest, 1)
    give(guest, calls(inside.slot, LONG), Step(What.VMFUNC, 0, other.slot))
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    revoke_slot(guest.vm, 0, other.slot)
    spin.work_on()
    spin.release()
    check_refused(told(guest), other.slot)
    assert results(guest)[0] is not None


def test_pages_come_back(kvm: Kvm) -> None:
    """The pages come back at once, while VM, object and the VMM's descriptors still exist."""
    with event_guest(kvm) as guest, spin_object().open() as instance:
        instance.register(kvm)  # what stays until the object is closed
        before = (pinned_pages(), locked_kib())
        attachment = instance.attach(guest)
        taken = pinned_pages() - before[0]
        assert taken > 10
        stats = guest.vm.stats()
        assert stats.value("elisa_pages") > taken  # table pages too
        assert locked_kib() - before[1] == stats.value("elisa_pages") * 4
        give(guest, calls(attachment.slot, LONG))
        spin = Spin(instance)
        guest.start()
        spin.wait_until_inside()
        for context in attachment.vcpus[0]._contexts:  # the slot holds the last reference
            context.close()
        assert pinned_pages() - before[0] == taken
        revoke_slot(guest.vm, 0, attachment.slot)
        assert told(guest).cause == uapi.lib.KVM_ELISA_EXIT_REVOKED
        assert (pinned_pages(), locked_kib()) == before
        assert (stats.value("elisa_pages"), stats.value("elisa_contexts")) == (0, 0)


def test_another_vm(kvm: Kvm, guest: BareGuest, instance: ObjectInstance) -> None:
    """Another guest of the same object works on; its slot is its own."""
    first = instance.attach(guest, 0)
    with BareGuest(kvm, Probe(), name="other") as other:
        prepare(other)
        second = instance.attach(other, 1)
        give(other, calls(second.slot, LONG))
        spin = Spin(instance)
        other.start()
        spin.wait_until_inside()
        revoke_slot(guest.vm, 0, first.slot)
        spin.work_on()
        spin.release()
        assert other.wait(60) == 0


def test_another_vcpu(guest: BareGuest, instance: ObjectInstance) -> None:
    first = instance.attach(guest, 0)
    vcpu = guest.vm.create_vcpu(1)
    second = instance.attach_vcpu(vcpu, 1)
    assert first.slot == second.slot  # slots of different lists
    revoke_slot(guest.vm, 0, None)
    assert revoke(guest.vm, 0, first.slot) == -errno.ENOENT
    assert revoke(guest.vm, 1, second.slot) == 0


def test_again_and_again(guest: BareGuest, instance: ObjectInstance) -> None:
    """Revocation at a different moment each time leaks nothing."""
    spin = Spin(instance)
    instance.register(guest.vm)
    pinned = pinned_pages()
    for number in range(8):
        attachment = instance.attach_vcpu(guest.vcpu, 0)
        start_over(guest, *(calls(attachment.slot, 500 << number) for _ in range(300)))
        guest.start()
        time.sleep(0.01 * number)
        revoke_slot(guest.vm, 0, attachment.slot)
        exit = told(guest)
        assert exit.cause in (uapi.lib.KVM_ELISA_EXIT_REVOKED, uapi.lib.KVM_ELISA_EXIT_VMFUNC)
        attachment.detach()
        assert pinned_pages() == pinned
    assert spin.begun > 0
