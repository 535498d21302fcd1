"""Guests with five-level paging (CR4.LA57) cross as others do; VMFUNC depends on the mode."""

import errno
from collections.abc import Iterator

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import IoctlError, Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.probe import (
    Probe,
    Step,
    What,
    calls,
    faults,
    give,
    prepare,
    probe_guest,
    results,
    run,
)
from tests.rigs.processor_modes import CR4, try_call, try_vmfunc

pytestmark = [pytest.mark.elisa, pytest.mark.processor("LA57")]

INVALID_OPCODE, GENERAL_PROTECTION = 6, 13
LA57 = 1 << 12
# One address that is canonical with five levels only, in the lower half, and one for both.
BASES = {
    "usual": crossing.CROSSING_GVA,
    "above four levels": 1 << 48 | crossing.CROSSING_GVA,
    "high": 0xA5 << 48 | crossing.CROSSING_GVA,
}


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with probe_guest(kvm, levels=5) as guest:
        yield guest


@pytest.mark.parametrize("name", BASES)
def test_it_crosses(kvm: Kvm, counter: ObjectInstance, name: str) -> None:
    with BareGuest(kvm, Probe(), paging_levels=5, crossing_gva=BASES[name]) as guest:
        prepare(guest)
        slot = counter.attach(guest).slot
        give(guest, *[calls(slot, 1)] * 3, Step(What.READ_CONTROL, 4))
        assert run(guest) == []
        assert results(guest) == [1, 2, 3, CR4 | LA57]


def test_without_an_exit(guest: BareGuest, counter: ObjectInstance) -> None:
    slot = counter.attach(guest).slot
    stats = guest.vcpu.stats()
    give(guest, calls(slot, 1), Step(What.MARK), *[calls(slot, 1)] * 100, Step(What.MARK))
    seen: list[int] = []
    assert run(guest, lambda _: seen.append(stats.value("elisa_exits"))) == []
    assert seen[0] == seen[1]
    assert results(guest)[-2] == 101


def test_detached_and_attached_again(guest: BareGuest, counter: ObjectInstance) -> None:
    attachment = counter.attach(guest)

    def on_mark(_: int) -> None:
        attachment.detach()
        assert counter.attach(guest).slot == attachment.slot

    give(guest, try_call(attachment.slot), Step(What.MARK), try_call(attachment.slot))
    assert run(guest, on_mark) == []
    assert faults(guest) == [None] * 3
    assert results(guest)[2] is not None


# ---- T7: another number of levels than that of the contexts --------------------------------------


@pytest.mark.attack("T7")
def test_contexts_for_four_levels(guest: BareGuest, counter: ObjectInstance) -> None:
    """VMFUNC stays off until these contexts are gone, and one list holds only one kind."""
    attachment = counter.attach_vcpu(guest.vcpu, 0, levels=4)
    with pytest.raises(IoctlError) as caught:
        counter.attach_vcpu(guest.vcpu, 1, levels=5)
    assert caught.value.errno == errno.EINVAL

    def on_mark(_: int) -> None:
        attachment.detach()
        assert counter.attach(guest).slot == attachment.slot

    tries = [try_vmfunc(index) for index in (0, attachment.slot, 511)]
    give(
        guest,
        *tries,
        try_call(attachment.slot),
        Step(What.MARK),
        try_vmfunc(),
        try_call(attachment.slot),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [INVALID_OPCODE] * 4 + [None] * 3
    assert results(guest)[-1] == 1


@pytest.mark.attack("T7")
def test_the_guest_cannot_change_them_in_64_bit_mode(
    guest: BareGuest, counter: ObjectInstance
) -> None:
    """Changing them raises #GP (SDM vol. 3A, 4.1.2)."""
    slot = counter.attach(guest).slot
    give(
        guest,
        Step(What.WRITE_CONTROL, 4, CR4, attempt=True),
        Step(What.READ_CONTROL, 4),
        try_vmfunc(),
        try_call(slot),
    )
    assert run(guest) == []
    assert faults(guest) == [GENERAL_PROTECTION, None, None, None]
    assert results(guest)[1] == CR4 | LA57
