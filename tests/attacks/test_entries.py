"""T1 to T4: VMFUNC with any index from any address, into the gate at any byte."""

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import crossing_images
from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.host_addresses import forge_ept, guest_page, host_address
from tests.rigs.attacks.leap import OWN_PAGES, Leap, Leaper, Register, give_leaps, left
from tests.rigs.attacks.vault_calls import copy_secret, failed, home_stack
from tests.rigs.attacks.victim import (
    AT_GATE,
    SECRET,
    C,
    join,
    still_serves,
    stolen,
    stop_at,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

TRANSIENT = uapi.lib.KVM_ELISA_SLOT_TRANSIENT


# ---- T1: the transient slot ----------------------------------------------------------------------


@pytest.mark.attack("T1")
def test_the_transient_slot_from_anywhere(kvm: Kvm, guest: BareGuest) -> None:
    """The transient slot is empty before the first call and after each.

    The guest tries it with internal code, each instruction of the sub entry page, and the gate's
    last instruction.
    """
    with vault() as instance:
        slot = join(guest, instance).slot
        home_stack(guest)
        serve = C + instance.symbols["serve"]
        places = [C + crossing.SUB_ENTRY_OFFSET + n for n in (8, 15, 22, 29)]
        places += [serve, serve + 5, serve + 6, C + crossing.GATE_OFFSET + 0xFD8]
        stray = [Leap(place, TRANSIENT) for place in places]
        stray.append(copy_secret(instance, TRANSIENT))
        leaps = [*stray]
        for each in stray:
            leaps += [Leap(slot=slot), each]
        give_leaps(guest, *leaps)
        assert failed(run(guest)) == [(0, TRANSIENT)] * 2 * len(stray)
        assert None not in left(guest)
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T1")
def test_a_slot_that_stays_filled_lets_the_guest_in(guest: BareGuest) -> None:
    """If the sub entry does not empty the slot, one honest call opens the way to internal code."""
    with vault(without={Protection.SLOT_CLEARING}) as instance:
        slot = join(guest, instance).slot
        home_stack(guest)
        give_leaps(guest, Leap(slot=slot), copy_secret(instance, TRANSIENT))
        assert run(guest) == []
        assert None not in left(guest)
        assert stolen(instance)


# ---- T2: any byte of the gate page ---------------------------------------------------------------


@pytest.mark.control("T2")
def test_a_sub_context_without_a_gate_is_entered_anywhere(guest: BareGuest) -> None:
    with vault() as instance:
        weak = WeakAttachment(guest, instance)
        slot = weak.enter_without_gate()
        home_stack(guest)
        give_leaps(guest, copy_secret(instance, slot))
        assert run(guest) == []
        assert None not in left(guest)
        assert stolen(instance)
        guest.close()
        weak.close()


# ---- T3: an EPTP of the guest's own -----------------------------------------------------------

LOW = 512  # pages from GPA 0 that the guest needs in the context that it makes up
FOUND, CODE, OBJECT = ((LOW - n) * PAGE_SIZE for n in (3, 2, 1))


def forged_context(guest: BareGuest, instance: ObjectInstance) -> int:
    """Return the EPTP of an EPT in the guest's memory that maps its low memory and the vault's.

    In place of the sub entry the guest has code that fetches the secret.
    """
    back = Leaper().image().address_of("leap_back")
    fetch = b"\x48\xa1" + OBJECT.to_bytes(8, "little")  # mov OBJECT, %rax
    fetch += b"\x48\xa3" + FOUND.to_bytes(8, "little")  # mov %rax, FOUND
    fetch += b"\x31\xc0\x31\xc9\x0f\x01\xd4"  # VMFUNC(0, 0)
    fetch += b"\xff\x25\0\0\0\0" + back.to_bytes(8, "little")
    guest.memory.write(CODE, fetch)
    guest.map(C + crossing.SUB_ENTRY_OFFSET, CODE, PAGE_SIZE, OWN_PAGES)
    for page in (FOUND, OBJECT):
        guest.map(page, page, PAGE_SIZE, OWN_PAGES)
    pages = {gpa: guest_page(guest.memory, gpa) for gpa in range(0, OBJECT, PAGE_SIZE)}
    pages[OBJECT] = host_address(instance.memory.host_address)
    return forge_ept(guest, layout.RX_LOG_GPA + 0x10_0000, pages)


def store_in(gate: bytes) -> int:
    """Return the address of the gate's store into the list: `mov %r8, transient(%rip)`."""
    assert gate.count(b"\x4c\x89\x05") == 1
    return C + crossing.GATE_OFFSET + gate.index(b"\x4c\x89\x05")


@pytest.mark.attack("T3")
@pytest.mark.parametrize("skip", [0, 1], ids=["store", "store without its prefix"])
def test_a_forged_eptp(kvm: Kvm, guest: BareGuest, skip: int) -> None:
    """The guest knows a host address, has built an EPT, and enters at the gate's store."""
    with vault() as instance:
        slot = join(guest, instance).slot
        eptp = forged_context(guest, instance)
        behind = store_in(crossing_images().gate_page) + skip
        give_leaps(guest, Leap(slot=slot), Leap(behind, slot, fill=eptp))
        exit = stop_at(run(guest), AT_GATE)
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_REFUSED
        assert exit.vmx_exit_reason == 2  # triple fault: the int3 after `mismatch`
        assert not any(guest.memory.read(FOUND, 8))
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T3")
def test_a_gate_without_its_check_takes_any_eptp(guest: BareGuest) -> None:
    without = frozenset({Protection.GATE_CHECK})
    with vault(without=without) as instance:
        slot = join(guest, instance).slot
        eptp = forged_context(guest, instance)
        behind = store_in(crossing_images(without).gate_page)
        give_leaps(guest, Leap(slot=slot), Leap(behind, slot, fill=eptp))
        assert run(guest) == []
        assert guest.memory.read(FOUND, 8) == SECRET.to_bytes(8, "little")


# ---- T4: any index -------------------------------------------------------------------------------


def all_indices(instance: ObjectInstance) -> list[Leap]:
    beyond = [512, 513, 1023, 4096, 1 << 16, 1 << 31, (1 << 32) - 1]
    leap = copy_secret(instance, 0)
    return [Leap(leap.behind, index, leap.registers) for index in [*range(1, 512), *beyond]]


@pytest.mark.attack("T4")
def test_every_index_and_other_functions(kvm: Kvm, guest: BareGuest) -> None:
    """All slots but the default context's, where the guest is, and the gate's are reported."""
    with vault() as instance:
        slot = join(guest, instance).slot
        home_stack(guest)
        leaps = [leap for leap in all_indices(instance) if leap.slot != slot]
        functions = [(1, slot), (2, 0), (63, TRANSIENT)]
        leaps += [
            Leap(leaps[0].behind, index, {Register.RAX: function}) for function, index in functions
        ]
        give_leaps(guest, Leap(leaps[0].behind, 0), *leaps)
        told = failed(run(guest))
        assert told == [(0, leap.slot) for leap in leaps[: -len(functions)]] + functions
        assert None not in left(guest)
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T4")
def test_every_index_finds_a_context_that_is_no_gate(guest: BareGuest) -> None:
    """The same search finds a sub context left in a slot far above the gate's."""
    with vault() as instance:
        weak = WeakAttachment(guest, instance)
        weak.enter_through_gate()
        hidden = weak.enter_without_gate(300)
        home_stack(guest)
        leaps = [leap for leap in all_indices(instance) if leap.slot > 2]
        give_leaps(guest, *leaps)
        told = failed(run(guest))
        assert (0, hidden) not in told
        assert len(told) == len(leaps) - 1
        assert stolen(instance)
        guest.close()
        weak.close()
