"""The patch's statistics (KVM_GET_STATS_FD): each counts its own events and no others."""

import os

import pytest

from pykvm.elisa.calls import revoke_slot
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.elisa.protections import Protection
from pykvm.kvm import Kvm, Stats
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.resources import GUEST_SOURCES
from tests.rigs.context_requests import (
    EPTP,
    LIST,
    Machine,
    R,
    Request,
    chain,
    good,
    leaf,
    set_slot,
)
from tests.rigs.probe import (
    WILD,
    Step,
    What,
    Wild,
    calls,
    give,
    results,
    run,
)
from tests.rigs.spinning import LONG, Spin, event_guest, spin_object

pytestmark = pytest.mark.elisa

VM_NAMES = ("elisa_contexts", "elisa_pages")
VCPU_NAMES = (
    "elisa_exits",
    "elisa_held",
    "elisa_returns",
    "elisa_revoked",
    "elisa_bad_vmfunc",
    "elisa_ejected",
)
NOTHING = dict.fromkeys(VCPU_NAMES, 0)


def wild_object() -> SharedObject:
    return SharedObject("wild", WILD, without={Protection.CODE_CHECK})


def read(stats: Stats, names: tuple[str, ...]) -> dict[str, int]:
    return {name: stats.value(name) for name in names}


def test_what_they_are(machine: Machine) -> None:
    vm = {each.name: each for each in machine.vm.stats().statistics}
    vcpu = {each.name: each for each in machine.vcpu.stats().statistics}
    assert {name for name in vm if name.startswith("elisa")} == set(VM_NAMES)
    assert {name for name in vcpu if name.startswith("elisa")} == set(VCPU_NAMES)
    for name in VM_NAMES:
        assert (vm[name].kind, vm[name].size) == ("instant", 1)
    for name in VCPU_NAMES:
        assert (vcpu[name].kind, vcpu[name].size) == ("cumulative", 1)


def test_contexts_and_pages(machine: Machine) -> None:
    """They count tables and pinned pages of every context that is still referenced."""
    stats = machine.vm.stats()

    def now() -> tuple[int, int]:
        return stats.value("elisa_contexts"), stats.value("elisa_pages")

    assert now() == (0, 0)
    first = good(machine).send(machine.vm)
    assert now() == (1, 4 + 3)
    second = good(machine).send(machine.vm)
    assert now() == (2, 2 * (4 + 3))
    assert good(machine, leaf(9)).send(machine.vm) < 0
    assert now() == (2, 2 * (4 + 3))
    assert set_slot(machine.vcpu, 2, second) == 0
    os.close(second)
    assert now()[0] == 2
    gate = Request(chain(leaf(0, R), leaf(1)), [(0, EPTP, first), (0, LIST, 0)]).send(machine.vm)
    contexts, pages = now()
    assert contexts == 3
    assert pages >= 2 * (4 + 3) + 4
    os.close(first)
    assert now() == (contexts, pages)  # the gate refers to it
    os.close(gate)
    assert now()[0] == 1
    assert set_slot(machine.vcpu, 2, -1) == 0
    assert now() == (0, 0)


def test_calls_count_nothing(guest: BareGuest) -> None:
    """The host does not see a crossing."""
    with SharedObject("counter", GUEST_SOURCES / "objects" / "counter.c").open() as counter:
        slot = counter.attach(guest).slot
        give(guest, *(calls(slot, 1) for _ in range(20)))
        stats = guest.vcpu.stats()
        assert run(guest) == []
        assert results(guest)[-1] == 20
        assert read(stats, VCPU_NAMES) == NOTHING


def test_failed_vmfunc(guest: BareGuest) -> None:
    with wild_object().open() as wild:
        wild.attach(guest)
        give(guest, *(Step(What.VMFUNC, 0, index) for index in (1, 3, 511)), Step(What.VMFUNC))
        stats = guest.vcpu.stats()
        assert len(run(guest)) == 3
        assert read(stats, VCPU_NAMES) == {**NOTHING, "elisa_bad_vmfunc": 3}


@pytest.mark.parametrize("what", [Wild.CPUID, Wild.VMCALL, Wild.READ])
def test_exits_of_a_context(guest: BareGuest, what: Wild) -> None:
    """Reported exits count; the host's own interrupts, which also leave a context, do not."""
    with wild_object().open() as wild:
        slot = wild.attach(guest).slot
        give(guest, calls(slot, what, layout.IMAGE_GPA))
        stats = guest.vcpu.stats()
        (exit,) = run(guest)
        assert isinstance(exit, ElisaExit)
        assert read(stats, VCPU_NAMES) == {**NOTHING, "elisa_exits": 1}


def test_host_interrupts_are_not_reported(kvm: Kvm) -> None:
    with event_guest(kvm) as guest, spin_object().open() as instance:
        spin, irq_exits = started(guest, instance)
        spin.work_on(2_000_000)
        spin.release()
        assert guest.wait(60) == 0
        stats = guest.vcpu.stats()
        assert stats.value("irq_exits") > irq_exits
        assert read(stats, VCPU_NAMES) == NOTHING


def started(guest: BareGuest, instance: ObjectInstance) -> tuple[Spin, int]:
    """Start a call; return once it is inside, with the count of the host's interrupts so far."""
    give(guest, calls(instance.attach(guest).slot, LONG))
    before = guest.vcpu.stats().value("irq_exits")
    spin = Spin(instance)
    guest.start()
    spin.wait_until_inside()
    return spin, before


def test_revoked(kvm: Kvm) -> None:
    with event_guest(kvm) as guest, spin_object().open() as instance:
        stats = guest.vcpu.stats()
        started(guest, instance)
        revoke_slot(guest.vm, 0, None)
        with pytest.raises(Exception, match="revoked context"):
            guest.wait(60)
        counted = read(stats, VCPU_NAMES)
        assert counted["elisa_revoked"] == 1
        assert counted["elisa_bad_vmfunc"] == 0
