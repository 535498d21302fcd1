"""Calls from user mode (CPL 3), with CR4.SMEP and CR4.SMAP enabled, through user attachments."""

import pytest

from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import build_object, crossing_images
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare.failures import GuestFaultError
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.user_mode import UserProgram, map_user_pages, user_samples
from pykvm.resources import GUEST_SOURCES
from tests.rigs.sources import OBJECTS

UNALIGNED = OBJECTS / "unaligned.c"
COUNTER = GUEST_SOURCES / "objects" / "counter.c"
INVALID_OPCODE = 6


def run(
    kvm: Kvm, instance: ObjectInstance, program: UserProgram, *, user: bool = True
) -> tuple[list[int], bytes]:
    """Run the program; return results and samples."""
    with BareGuest(kvm, program) as guest:
        slot = instance.attach_vcpu(guest.vcpu, 0, user=user).slot
        guest.map_crossing(crossing_images(), user=True)  # also for an attachment for kernel mode
        guest.announce(slot, instance.window_region(0, guest.next_window_gpa()))
        map_user_pages(guest, program)
        assert guest.run() == 0
        return guest.results(), guest.samples()


def check_ejected(
    kvm: Kvm, instance: ObjectInstance, program: UserProgram, *, user: bool = True
) -> None:
    """Check that the guest's kernel gets an invalid opcode of the program."""
    with pytest.raises(GuestFaultError, match="in trusted code") as caught:
        run(kvm, instance, program, user=user)
    assert (caught.value.vector, caught.value.rip) == (INVALID_OPCODE, 0)


@pytest.mark.unit
def test_built() -> None:
    """Building fills the cache for the emulated host, which would take long to compile."""
    assert UserProgram().image().address_of("user_page") % 4096 == 0
    nop = GUEST_SOURCES / "objects" / "nop.c"
    for source in (UNALIGNED, COUNTER, nop):
        build_object([source])
        build_object([source], user=True)
    left_out = frozenset({Protection.FLAG_CLEARING})
    build_object([UNALIGNED], without=left_out)
    build_object([UNALIGNED], user=True, without=left_out)


@pytest.mark.elisa
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd stack"])
def test_registers_and_flags(kvm: Kvm, odd: bool) -> None:
    with SharedObject("counter", COUNTER, guests=1).open() as counter:
        results, _ = run(kvm, counter, UserProgram(20, odd_stack=odd, argument=7))
        assert results[:2] == [20, 140]
        assert int.from_bytes(counter.shared[:8], "little") == 140
        assert int.from_bytes(counter.window(0)[:8], "little") == 140


@pytest.mark.attack("T10")
@pytest.mark.elisa
def test_alignment_checks_of_the_caller_do_not_reach_the_object(kvm: Kvm) -> None:
    """T10, T14: CR0.AM and RFLAGS.AC are on, and the object makes unaligned accesses."""
    with SharedObject("unaligned", UNALIGNED, guests=1).open() as instance:
        results, _ = run(kvm, instance, UserProgram(5, alignment=True, argument=11))
        assert results[:2] == [5, 55]
        assert int.from_bytes(instance.shared[3:11], "little") == 55
        assert int.from_bytes(instance.window(0)[5:13], "little") == 55


@pytest.mark.control("T10")
@pytest.mark.elisa
def test_they_would_without_clearing_the_flag(kvm: Kvm) -> None:
    """Control: an alignment fault in the sub context, from which the program is ejected."""
    without = {Protection.FLAG_CLEARING}
    with SharedObject("unaligned", UNALIGNED, guests=1, without=without).open() as instance:
        check_ejected(kvm, instance, UserProgram(5, alignment=True, argument=11))
        assert not any(instance.shared[:16])


@pytest.mark.elisa
def test_user_mode_does_not_get_through_a_gate_for_kernel_mode(kvm: Kvm) -> None:
    with SharedObject("counter", COUNTER, guests=1).open() as counter:
        check_ejected(kvm, counter, UserProgram(1, argument=7), user=False)
        assert not any(counter.shared[:8])


@pytest.mark.elisa
@pytest.mark.counted
def test_a_crossing_from_user_mode_takes_39_instructions(kvm: Kvm) -> None:
    if not is_emulated():
        pytest.skip("the time stamp counter counts instructions on the emulated host only")
    nop = SharedObject("nop", GUEST_SOURCES / "objects" / "nop.c", guests=1)
    with nop.open() as instance:
        _, samples = run(kvm, instance, UserProgram(timed=50))
    empty, calls = user_samples(samples, 50)
    assert min(calls) - min(empty) == 39
