"""I9: resources are freed after the last possible use, and not before, in any order of closing."""

import gc
import itertools
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pykvm.elisa.calls import Context, enable_contexts
from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import Protection
from pykvm.kvm import Kvm, UnexpectedExitError
from pykvm.machine.bare.failures import GuestTimeoutError
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.context_requests import PAGE, Machine, Memory, good, set_slot
from tests.rigs.host_state import HostState, locked_kib, nothing_stays, pinned_pages
from tests.rigs.probe import WILD, Probe, Wild, calls, give, prepare, results, run

pytestmark = pytest.mark.elisa


@pytest.mark.attack("T20")
@pytest.mark.parametrize("order", list(itertools.permutations(("context", "vcpu", "vm"))))
def test_any_order_of_closing(kvm: Kvm, order: tuple[str, ...]) -> None:
    """A context in a slot and each of the three files keep the VM; the last one frees it."""
    with Memory(3) as address, nothing_stays() as before:
        vm = kvm.create_vm()
        enable_contexts(vm)
        vcpu = vm.create_vcpu(0)
        context = Context(vm, good(Machine(vm, vcpu, address)).send(vm))
        assert set_slot(vcpu, 2, context.fileno()) == 0
        handles = {"context": context, "vcpu": vcpu, "vm": vm}
        files = {name: os.dup(handle.fileno()) for name, handle in handles.items()}
        context.close()
        vm.close()  # and the vCPU, so that only the copies are left
        for name in order:
            assert pinned_pages() == before.pinned + 3
            os.close(files[name])


@pytest.mark.attack("T20")
@pytest.mark.parametrize("installed", [True, False])
def test_a_copied_descriptor_keeps_a_context(machine: Machine, installed: bool) -> None:
    with nothing_stays() as before:
        fd = good(machine).send(machine.vm)
        copy = os.dup(fd)
        if installed:
            assert set_slot(machine.vcpu, 2, fd) == 0
        os.close(fd)
        assert pinned_pages() == before.pinned + 3
        if installed:
            assert set_slot(machine.vcpu, 2, -1) == 0
        assert pinned_pages() == before.pinned + 3
        os.close(copy)


@pytest.mark.attack("T20")
def test_a_child_closes_last(kvm: Kvm) -> None:
    """Pages charged to this process are uncharged from it, whoever drops the last reference."""
    with nothing_stays() as before, Memory(3) as address:
        with kvm.create_vm() as vm:
            enable_contexts(vm)
            fd = good(Machine(vm, vm.create_vcpu(0), address)).send(vm)
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(writer)
                os.read(reader, 1)  # until the parent closes its end
                os._exit(0)
            os.close(reader)
            os.close(fd)
        assert pinned_pages() == before.pinned + 3
        assert locked_kib() == before.locked + 28
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.attack("T21")
def test_many_contexts(machine: Machine) -> None:
    """Slots are refilled while old contexts exist; only the last ones count."""
    with nothing_stays() as before:
        for _ in range(40):
            fd = good(machine).send(machine.vm)
            for slot in (2, 3):
                assert set_slot(machine.vcpu, slot, fd) == 0
            os.close(fd)
        assert pinned_pages() == before.pinned + 3
        for slot in (2, 3):
            assert set_slot(machine.vcpu, slot, -1) == 0


def wild(name: str = "wild") -> SharedObject:
    return SharedObject(
        name, WILD, shared=PAGE, window=PAGE, guests=2, without={Protection.CODE_CHECK}
    )


def looping(guest: BareGuest, slot: int) -> None:
    """Stop the guest in the middle of a call that never returns."""
    give(guest, calls(slot, Wild.LOOP))
    guest.start()
    with pytest.raises(GuestTimeoutError):
        guest.wait(0.3)


@pytest.fixture
def nothing_stays_of_guests() -> Iterator[HostState]:
    """Yield as `nothing_stays` does, around a test with guests.

    A `BareGuest` keeps its memory readable until the last reference to it is gone.
    """
    with nothing_stays() as before:
        yield before
        gc.collect()


def test_an_object_closed_under_a_vcpu_inside_it(
    kvm: Kvm, nothing_stays_of_guests: HostState
) -> None:
    before = nothing_stays_of_guests
    with BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        with wild().open() as instance:
            looping(guest, instance.attach(guest).slot)
            assert instance.shared[0] == 1
        # The guest stopped inside the object; closing it took the context away.
        assert pinned_pages() == before.pinned
        guest.start()
        with pytest.raises(UnexpectedExitError, match="revoked context"):
            guest.wait(5)
    assert pinned_pages() == before.pinned
    still_works(kvm)


@pytest.mark.attack("T20")
@pytest.mark.usefixtures("nothing_stays_of_guests")
def test_a_vcpu_closed_inside_the_object(kvm: Kvm) -> None:
    """Another guest of the same object is not disturbed."""
    with wild().open() as instance, BareGuest(kvm, Probe()) as second:
        with BareGuest(kvm, Probe()) as first:
            prepare(first)
            looping(first, instance.attach(first).slot)
            first.vcpu.close()
        prepare(second)
        give(second, calls(instance.attach(second, 1).slot, Wild.HELLO))
        assert run(second) == []
        assert results(second) == [1001]


def still_works(kvm: Kvm) -> None:
    with wild().open() as instance, BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        give(guest, calls(instance.attach(guest).slot, Wild.HELLO))
        assert run(guest) == []
        assert results(guest) == [1000]


@pytest.mark.attack("T19")
def test_killed_inside_the_object(kvm: Kvm) -> None:
    """After SIGKILL while a vCPU runs in a sub context, the kernel cleans up alone."""
    with nothing_stays() as before:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                _run_for_ever(writer)
            finally:
                os._exit(1)
        os.close(writer)
        try:
            assert os.read(reader, 1) == b"!"
            assert pinned_pages() > before.pinned
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            os.close(reader)
        assert os.WTERMSIG(status) == signal.SIGKILL
    still_works(kvm)


def _run_for_ever(tell: int) -> None:
    with Kvm() as kvm, wild().open() as instance, BareGuest(kvm, Probe()) as guest:
        prepare(guest)
        give(guest, calls(instance.attach(guest).slot, Wild.LOOP))

        def watch() -> None:
            while not instance.shared[0]:
                pass
            os.write(tell, b"!")

        threading.Thread(target=watch, daemon=True).start()
        run(guest)
