"""T8, T29: VMFUNC in compatibility mode, and from a guest's unprivileged process."""

from collections.abc import Iterator

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.segments import (
    LOW,
    RSP,
    VMFUNC,
    Invalid,
    Jump,
    Jumper,
    Segments,
    give_jumps,
    invalid,
    landed,
)
from tests.rigs.attacks.victim import (
    AT_GATE,
    C,
    knocks,
    still_serves,
    stop_at,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import WeakAttachment, crossing_anywhere
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

TRANSIENT = uapi.lib.KVM_ELISA_SLOT_TRANSIENT
TRIPLE_FAULT = 2  # SDM vol. 3D, appendix C
GATE = C + crossing.GATE_OFFSET
EJECTED = Invalid(rip=0, left=0)  # from trusted code, or on its way there
OFFICIAL = 0xFD8  # offset in the gate page of its second entry, after the jump
LAST = 0xFFD  # offset of its last VMFUNC


@pytest.fixture
def jumper(kvm: Kvm) -> Iterator[BareGuest]:
    with BareGuest(kvm, Jumper()) as guest:
        yield guest


def join(guest: BareGuest, instance: ObjectInstance, *, user: bool = False) -> int:
    """Attach as guest 0 and return the gate's slot; `give_jumps` maps the guest's own pages."""
    slot = instance.attach_vcpu(guest.vcpu, 0, user=user).slot
    guest.announce(slot, instance.window_region(0, guest.next_window_gpa()))
    return slot


def stopped_in_gate(guest: BareGuest) -> ElisaExit:
    """Return the guest's last exit: a fault without a handler at the gate's first instruction."""
    exits = run(guest)
    exit = stop_at(exits, AT_GATE)
    assert (exit.cause, exit.vmx_exit_reason) == (uapi.lib.KVM_ELISA_EXIT_REFUSED, TRIPLE_FAULT)
    return exit


# ---- T8: compatibility mode ----------------------------------------------------------------------

PLACES = {
    "anywhere": 0x5000_0800,
    "low half of the gate's address": GATE % LOW,
    "low half of the official path": GATE % LOW + OFFICIAL,
    "low half of the last instruction": GATE % LOW + LAST,
    "low half of the sub entry": (C + crossing.SUB_ENTRY_OFFSET) % LOW,
    "across 4 GiB": 0,
}


@pytest.mark.attack("T8")
@pytest.mark.parametrize("place", PLACES)
def test_compatibility_mode(kvm: Kvm, jumper: BareGuest, place: str) -> None:
    """The gate context maps nothing below 4 GiB, so the next instruction faults.

    Slot 0, after which the guest goes on, shows that VMFUNC works in this mode at all.
    """
    with vault() as instance:
        slot = join(jumper, instance)
        narrow = Segments.NARROW_KERNEL
        home = Jump(narrow, PLACES["anywhere"], 0)
        give_jumps(jumper, home, Jump(narrow, PLACES[place], slot))
        exit = stopped_in_gate(jumper)
        assert landed(jumper) == [0, None]
        # The byte after the last one below 4 GiB has address 0 or 4 GiB; nothing is mapped at
        # either.
        assert exit.rip <= LOW
        assert exit.rip % LOW == PLACES[place]
        assert knocks(instance) == 0
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.attack("T8")
@pytest.mark.parametrize("place", PLACES)
def test_compatibility_mode_of_a_process(kvm: Kvm, jumper: BareGuest, place: str) -> None:
    """The same fault is the process's own, and the guest goes on."""
    with vault() as instance:
        slot = join(jumper, instance)
        narrow = Segments.NARROW_USER
        home = Jump(narrow, PLACES["anywhere"], 0)
        give_jumps(jumper, home, Jump(narrow, PLACES[place], slot), home)
        assert run(jumper) == []
        assert invalid(jumper) == [None, EJECTED, None]
        assert knocks(instance) == 0
        assert untouched(instance)
        assert still_serves(kvm, instance)


LOW_CROSSING = 0x8000_0000


@pytest.mark.control("T8")
def test_a_gate_below_4_gib_is_other_instructions(jumper: BareGuest) -> None:
    """The gate's first byte, a REX prefix, decrements ESP in 32-bit code.

    The next bytes are a branch to before the page, which the gate does not have in 64-bit mode.
    """
    with vault() as instance, crossing_anywhere():
        weak = WeakAttachment(jumper, instance, crossing_gva=LOW_CROSSING, own_pages=False)
        slot = weak.enter_through_gate()
        gate = LOW_CROSSING + crossing.GATE_OFFSET
        ways = (Segments.KERNEL, Segments.NARROW_KERNEL)
        landing = LOW_CROSSING + crossing.RETURN_OFFSET
        give_jumps(jumper, *(Jump(way, gate, slot) for way in ways), landing=landing)
        exit = stopped_in_gate(jumper)
        registers = jumper.vcpu.get_regs()
        assert landed(jumper) == [0, None]
        assert knocks(instance) == 1  # in 64-bit mode it is the gate
        assert registers.rsp == RSP - 1
        assert registers.rax != 0
        assert exit.rip < gate
        jumper.close()
        weak.close()


# ---- T29: a process of the guest -----------------------------------------------------------------

USER = [Segments.USER, Segments.NARROW_USER]
GATE_PLACES = {"start": 0, "inside": 0x10, "official path": OFFICIAL, "last instruction": LAST}
RETURN = C + crossing.RETURN_OFFSET


@pytest.mark.attack("T29")
@pytest.mark.parametrize("place", GATE_PLACES)
def test_a_process_runs_vmfunc(kvm: Kvm, jumper: BareGuest, place: str) -> None:
    """The gate of an attachment for kernel mode is a supervisor page: fetching from it faults.

    The process has an invalid opcode, and nothing in its registers; its kernel goes on.
    """
    with vault() as instance:
        slot = join(jumper, instance)
        bad = Jump(Segments.USER, GATE + GATE_PLACES[place], slot)
        home = Jump(Segments.USER, PLACES["anywhere"], 0)
        give_jumps(jumper, bad, home, bad, home, landing=RETURN)
        assert run(jumper) == []
        assert invalid(jumper) == [EJECTED, None] * 2
        assert jumper.vcpu.stats().value("elisa_ejected") == 2
        assert jumper.vcpu.stats().value("elisa_exits") == 0
        assert knocks(instance) == 0
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.attack("T29")
@pytest.mark.parametrize("segments", USER, ids=lambda segments: segments.name.lower())
def test_a_process_tries_other_slots(kvm: Kvm, jumper: BareGuest, segments: Segments) -> None:
    """Slot 0 is the guest's own context; VMFUNC to every other slot is an invalid opcode."""
    with vault() as instance:
        slot = join(jumper, instance)
        empty = [TRANSIENT, slot + 1, 511, 512, (1 << 32) - 1]
        jumps = [Jump(segments, PLACES["anywhere"], index) for index in (0, *empty, 0)]
        give_jumps(jumper, *jumps)
        assert run(jumper) == []
        at = PLACES["anywhere"] - len(VMFUNC)
        found = [end and end.rip for end in invalid(jumper)]
        assert found == [None, *[at] * len(empty), None]
        assert jumper.vcpu.stats().value("elisa_bad_vmfunc") == len(empty)
        assert knocks(instance) == 0
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.control("T29")
def test_a_process_calls_what_is_attached_for_user_mode(jumper: BareGuest) -> None:
    """With user pages the object counts the call after the same jump."""
    with vault() as instance:
        slot = join(jumper, instance, user=True)
        give_jumps(jumper, Jump(Segments.USER, GATE, slot), landing=RETURN)
        assert run(jumper) == []
        assert landed(jumper) == [0]
        assert knocks(instance) == 1
