"""T9, T10: exceptions in trusted code, with handlers and descriptors that the guest has written."""

import pytest

from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.edits import NO_BOUND
from tests.rigs.attacks.exceptions import (
    ACROSS_THE_END,
    BAD_POINTERS,
    GDT_AT,
    GENERAL_PROTECTION,
    IDT_AT,
    PAGE_FAULT,
    breakpoints,
    descriptors_in_window,
    hijack,
)
from tests.rigs.attacks.leap import OWN_PAGES, Leap, Register, give_leaps, left
from tests.rigs.attacks.objects import FAULTY_DECLARATION
from tests.rigs.attacks.vault_calls import note
from tests.rigs.attacks.victim import (
    AT_GATE,
    AT_SUB,
    OPEN,
    SECRET,
    SHARED,
    VAULT,
    WINDOW,
    WORD_AT,
    C,
    join,
    knocks,
    put,
    still_serves,
    stolen,
    stop_at,
    untouched,
    vault,
)
from tests.rigs.attacks.weak_contexts import edited_object
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

TRAP_FLAG = 1 << 8


@pytest.mark.attack("T9")
@pytest.mark.parametrize("where", ["sub entry", "object", "return"])
def test_a_breakpoint_in_trusted_code(kvm: Kvm, guest: BareGuest, where: str) -> None:
    """With IDT, GDT and stack in the window, the handler, which is internal code, never runs.

    Either VMFUNC does not work meanwhile, or the exception exits and ends the guest's run.
    """
    with vault() as instance:
        slot = join(guest, instance).slot
        leap = hijack(guest, instance, slot, dr0=breakpoints(instance)[where])
        give_leaps(guest, Leap(slot=slot), leap)
        exits = run(guest)
        if exits:
            assert stop_at(exits, AT_SUB).rip == leap.dr0
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.attack("T9")
@pytest.mark.parametrize("where", ["sub entry", "object", "return"])
def test_a_breakpoint_with_tables_elsewhere(kvm: Kvm, guest: BareGuest, where: str) -> None:
    """KVM intercepts the exception, which ends the guest's run."""
    with vault() as instance:
        slot = join(guest, instance).slot
        give_leaps(guest, Leap(slot=slot, dr0=breakpoints(instance)[where]))
        exit = stop_at(run(guest), AT_SUB)
        assert (exit.cause, exit.vmx_exit_reason) == (uapi.lib.KVM_ELISA_EXIT_REFUSED, 0)
        assert exit.rip == breakpoints(instance)[where]
        assert untouched(instance)
        assert still_serves(kvm, instance)


@pytest.mark.attack("T9")
def test_single_steps(kvm: Kvm, guest: BareGuest) -> None:
    """RFLAGS.TF, set right before the call, reaches no handler in the gate.

    The first traps are in the guest's own code. The one after VMFUNC is in the gate.
    """
    with vault() as instance:
        slot = join(guest, instance).slot
        leap = hijack(guest, instance, slot, flags=TRAP_FLAG)
        # In the default context the guest has its own page at the address of the vault's code.
        page = (C + instance.symbols["vault_copy"]) // PAGE_SIZE * PAGE_SIZE
        guest.map(page, layout.RX_LOG_GPA, PAGE_SIZE, OWN_PAGES)
        guest.memory.write(layout.RX_LOG_GPA, b"\x48\xcf" * (PAGE_SIZE // 2))  # iretq
        give_leaps(guest, leap)
        exits = run(guest)
        if exits:  # VMFUNC worked, so the guest reached the gate's first instruction
            stop_at(exits, AT_GATE)
        assert knocks(instance) == 0
        assert untouched(instance)
        assert still_serves(kvm, instance)


# ---- T10: faults that arguments provoke ----------------------------------------------------------


@pytest.mark.attack("T10")
@pytest.mark.parametrize("name", BAD_POINTERS)
def test_a_fault_with_tables_in_the_window(guest: BareGuest, name: str) -> None:
    """VMFUNC does not work while the tables are in the window; afterwards it works again.

    The handler would be internal code with arguments of the guest's.
    """
    with FAULTY_DECLARATION.open() as instance:
        put(instance.shared, 0, SECRET)
        slot = join(guest, instance).slot
        vectors = dict.fromkeys(
            (PAGE_FAULT, GENERAL_PROTECTION), C + instance.symbols["vault_copy"]
        )
        descriptors_in_window(guest, instance, vectors)
        registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RDX: BAD_POINTERS[name]}
        bad = Leap(slot=slot, registers=registers, idt=WINDOW + IDT_AT, gdt=WINDOW + GDT_AT)
        good = Leap(slot=slot, registers={Register.RDX: SHARED})
        give_leaps(guest, bad, good)
        assert run(guest) == []
        _, last = left(guest)
        assert last is not None
        assert last[Register.RAX] == 0
        assert not stolen(instance)


@pytest.mark.attack("T10")
@pytest.mark.parametrize("name", BAD_POINTERS)
def test_a_fault_with_tables_elsewhere(guest: BareGuest, name: str) -> None:
    """No handler can be reached: the vCPU stops at the fault, and the VMM is told."""
    with FAULTY_DECLARATION.open() as instance:
        put(instance.shared, 0, SECRET)
        slot = join(guest, instance).slot
        registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RDX: BAD_POINTERS[name]}
        give_leaps(guest, Leap(slot=slot, registers=registers))
        exit = stop_at(run(guest), AT_SUB)
        # Guest paging maps whole large pages, the EPT the memory alone.
        expected = (uapi.lib.KVM_ELISA_EXIT_REFUSED, 2)
        if name == ACROSS_THE_END:
            expected = (uapi.lib.KVM_ELISA_EXIT_VIOLATION, 48)
        assert (exit.cause, exit.vmx_exit_reason) == expected
        assert not stolen(instance)


@pytest.mark.attack("T10")
def test_indices_out_of_range(guest: BareGuest) -> None:
    """Indices at the end, past it, wrapping, far away, not canonical: refused, nothing written."""
    with vault() as instance:
        slot = join(guest, instance).slot
        word = word_index(instance)
        indices = [512, 513, 1 << 31, 1 << 32, 1 << 60, 1 << 61, (1 << 61) + 511, word]
        indices += [(1 << 64) - 1, (1 << 64) - 512, 1 << 63]
        give_leaps(guest, *(note(slot, index, 0) for index in indices), Leap(slot=slot))
        assert run(guest) == []
        *refused, last = left(guest)
        assert {out and out[Register.RAX] for out in refused} == {2**64 - 22}  # EINVAL
        assert last is not None
        assert untouched(instance)


@pytest.mark.control("T13")
@pytest.mark.control("T10")
def test_an_object_without_its_check_is_written_through(guest: BareGuest) -> None:
    """An index of the guest's choice reaches the word that opens the vault."""
    with vault(edited_object(VAULT, NO_BOUND)) as instance:
        slot = join(guest, instance).slot
        mine = 0x1111
        opens = {Register.RDI: OPEN, Register.RSI: mine}
        give_leaps(guest, note(slot, word_index(instance), mine), Leap(slot=slot, registers=opens))
        assert run(guest) == []
        assert stolen(instance)


def word_index(instance: ObjectInstance) -> int:
    """Return the index at which the vault's word would be among the notes."""
    return (SHARED + WORD_AT - C - instance.symbols["vault_notes"]) // 8
