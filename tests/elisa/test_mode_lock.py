"""I5: VMFUNC works only in the mode for which the contexts were built.

In other modes it is an invalid opcode for the guest. It works again when the mode is restored.
"""

import errno

import pytest

from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Hlt, IoctlError, Shutdown
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.probe import Step, What, faults, give, results, run
from tests.rigs.processor_modes import (
    CODE,
    CR0,
    CR4,
    LONG_MODE_CODE,
    OFF,
    ON,
    PAE,
    PG,
    PGE,
    SMAP,
    SMEP,
    WP,
    Mode,
    try_call,
    try_vmfunc,
    vmfunc_in,
)

pytestmark = pytest.mark.elisa

INVALID_OPCODE = 6
# ---- changes by the guest itself -----------------------------------------------------------------


@pytest.mark.attack("T7")
def test_without_smap(guest: BareGuest, counter: ObjectInstance) -> None:
    slot = counter.attach(guest).slot
    give(
        guest,
        try_vmfunc(),
        try_call(slot),
        Step(What.READ_CONTROL, 4),
        Step(What.WRITE_CONTROL, 4, CR4 & ~SMAP),
        try_vmfunc(),
        try_call(slot),
        try_vmfunc(slot),
        try_vmfunc(511),
        Step(What.WRITE_CONTROL, 4, CR4),
        try_vmfunc(),
        try_call(slot),
    )
    assert run(guest) == []
    assert faults(guest) == [None] * 4 + [INVALID_OPCODE] * 4 + [None] * 3
    values = results(guest)
    assert values[2] == CR4
    assert (values[1], values[-1]) == (1, 2)


def test_again_and_again(guest: BareGuest, counter: ObjectInstance) -> None:
    """VMFUNC follows every change, in both directions."""
    slot = counter.attach(guest).slot
    rounds = 10
    steps = []
    for _ in range(rounds):
        steps += [Step(What.WRITE_CONTROL, 4, CR4 & ~SMAP), try_call(slot)]
        steps += [Step(What.WRITE_CONTROL, 4, CR4), try_call(slot)]
    give(guest, *steps)
    assert run(guest) == []
    assert faults(guest) == [None, INVALID_OPCODE, None, None] * rounds
    assert results(guest)[3::4] == list(range(1, rounds + 1))


@pytest.mark.parametrize(
    ("register", "value"),
    [(4, CR4 & ~SMEP), (4, CR4 | PGE), (0, CR0 & ~WP), (0, CR0 | 1 << 3)],
    ids=["without SMEP", "with PGE", "without WP", "with TS"],
)
def test_bits_that_do_not_matter(
    guest: BareGuest, counter: ObjectInstance, register: int, value: int
) -> None:
    """Contexts depend on none of these bits."""
    slot = counter.attach(guest).slot
    give(guest, Step(What.WRITE_CONTROL, register, value), try_vmfunc(), try_call(slot))
    assert run(guest) == []
    assert faults(guest) == [None] * 3
    assert results(guest)[2] == 1


def test_bits_that_nobody_has_in_long_mode(guest: BareGuest, counter: ObjectInstance) -> None:
    """64-bit code cannot turn off PAE and paging (SDM vol. 3A, 10.8.5.4).

    The guest has to leave 64-bit mode first, as below.
    """
    counter.attach(guest)
    give(
        guest,
        Step(What.WRITE_CONTROL, 4, CR4 & ~PAE, attempt=True),
        Step(What.WRITE_CONTROL, 0, CR0 & ~PG, attempt=True),
        try_vmfunc(),
    )
    assert run(guest) == []
    assert faults(guest) == [13, 13, None]


def test_attached_in_the_wrong_mode(guest: BareGuest, counter: ObjectInstance) -> None:
    """The list is created while SMAP is off."""

    def on_mark(_: int) -> None:
        counter.attach(guest)

    give(
        guest,
        Step(What.WRITE_CONTROL, 4, CR4 & ~SMAP),
        Step(What.MARK),
        try_vmfunc(),
        Step(What.WRITE_CONTROL, 4, CR4),
        try_vmfunc(),
        try_call(uapi.lib.KVM_ELISA_SLOT_FIRST),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [None, None, INVALID_OPCODE, None, None, None]
    assert results(guest)[-1] == 1


def test_a_guest_without_a_list(guest: BareGuest) -> None:
    give(guest, try_vmfunc(), try_vmfunc(2))
    assert run(guest) == []
    assert faults(guest) == [INVALID_OPCODE] * 2


# ---- modes set by the VMM ------------------------------------------------------------------------


def _in_mode(
    guest: BareGuest, counter: ObjectInstance, mode: Mode, *, gate: bool = False
) -> list[Exit]:
    """Return the exits of VMFUNC(0, 0), VMFUNC(0, 1) and, if asked for, to the gate, in that mode.

    Slot 0 is the default context, and slot 1 is empty. The guest calls the object before and after.
    """
    slot = counter.attach(guest).slot
    guest.map(LONG_MODE_CODE, CODE, PAGE_SIZE, Access.READ | Access.EXECUTE)
    give(guest, try_call(slot), Step(What.MARK), try_call(slot))
    slots = (0, 1, slot) if gate else (0, 1)
    seen: list[Exit] = []
    assert run(guest, lambda _: seen.extend(vmfunc_in(guest, mode, i) for i in slots)) == []
    assert results(guest) == [1, 0, 2]
    return seen


@pytest.mark.attack("T7")
@pytest.mark.parametrize("name", OFF)
def test_modes_without_vmfunc(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    assert _in_mode(guest, counter, OFF[name], gate=True) == [Shutdown()] * 3


@pytest.mark.parametrize("name", ON)
def test_modes_with_vmfunc(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    """VMFUNC works, or the VMM is told of the empty slot."""
    works, empty = _in_mode(guest, counter, ON[name])
    assert works == Hlt()
    assert isinstance(empty, ElisaExit)
    assert (empty.cause, empty.index) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, 1)


# ---- five-level paging ---------------------------------------------------------------------------


@pytest.mark.attack("T7")
def test_a_list_for_five_levels(guest: BareGuest, counter: ObjectInstance) -> None:
    """In a guest with four levels VMFUNC stays off, and one list holds only one kind."""
    attachment = counter.attach_vcpu(guest.vcpu, 0, levels=5)
    with pytest.raises(IoctlError) as caught:
        counter.attach_vcpu(guest.vcpu, 1)
    assert caught.value.errno == errno.EINVAL

    def on_mark(_: int) -> None:
        attachment.detach()
        assert counter.attach(guest).slot == attachment.slot

    give(
        guest,
        try_vmfunc(),
        try_vmfunc(attachment.slot),
        Step(What.MARK),
        try_vmfunc(),
        try_call(attachment.slot),
    )
    assert run(guest, on_mark) == []
    assert faults(guest) == [INVALID_OPCODE] * 2 + [None] * 3
    assert results(guest)[-1] == 1
