"""T30: an exit of trusted code that KVM would serve with the guest's own memory.

KVM emulates accesses that it cannot map. It fetches the instruction and uses the stack through the
guest's own page tables, from the guest's memory, where the guest has written what it likes.
"""

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.edits import WRITES
from tests.rigs.attacks.leap import OWN_PAGES, Leap, Register, give_leaps
from tests.rigs.attacks.objects import FAULTY
from tests.rigs.attacks.victim import (
    AT_SUB,
    SHARED,
    WINDOW,
    C,
    join,
    stolen,
    stop_at,
    vault,
)
from tests.rigs.attacks.weak_contexts import edited_object
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.probe import run

pytestmark = pytest.mark.elisa

# Mapped read-only: an EPT violation, not a page fault.
READ_ONLY = {
    "environment": C + crossing.ENV_OFFSET,
    "its own code": C + crossing.IMAGE_OFFSET,
}
RET = b"\xc3"


def emulated_return(guest: BareGuest, instance: ObjectInstance, slot: int, pointer: int) -> Leap:
    """Return a call that makes the object write to `pointer`.

    The guest's own memory holds a RET at each address of the object's code, and the address of
    internal code everywhere on the stack.
    """
    code = (C + instance.symbols["elisa_serve"]) & -PAGE_SIZE
    stack = C + crossing.STACK_OFFSET + crossing.STACK_SIZE - PAGE_SIZE
    internal = C + instance.symbols["vault_copy"]
    contents = (RET * PAGE_SIZE, internal.to_bytes(8, "little") * (PAGE_SIZE // 8))
    for number, (gva, content) in enumerate(zip((code, stack), contents, strict=True)):
        gpa = layout.RX_LOG_GPA + number * PAGE_SIZE
        guest.map(gva, gpa, PAGE_SIZE, OWN_PAGES)
        guest.memory.write(gpa, content)
    registers = {Register.RDI: WINDOW, Register.RSI: SHARED, Register.RDX: pointer}
    return Leap(slot=slot, registers=registers)


@pytest.mark.attack("T30")
@pytest.mark.parametrize("name", READ_ONLY)
def test_an_instruction_of_the_guests_own(kvm: Kvm, guest: BareGuest, name: str) -> None:
    with vault(edited_object(FAULTY, WRITES)) as instance:
        slot = join(guest, instance).slot
        give_leaps(guest, emulated_return(guest, instance, slot, READ_ONLY[name]))
        exit = stop_at(run(guest), AT_SUB)
        assert (exit.cause, exit.gva) == (uapi.lib.KVM_ELISA_EXIT_VIOLATION, READ_ONLY[name])
        assert exit.rip & -PAGE_SIZE == (C + instance.symbols["elisa_serve"]) & -PAGE_SIZE
        assert not stolen(instance)


@pytest.mark.weakened
@pytest.mark.control("T30")
@pytest.mark.parametrize("name", READ_ONLY)
def test_kvm_emulates_what_the_guest_has_there(guest: BareGuest, name: str) -> None:
    with weakened(Weaken.EXITS), vault(edited_object(FAULTY, WRITES)) as instance:
        slot = join(guest, instance).slot
        give_leaps(guest, emulated_return(guest, instance, slot, READ_ONLY[name]))
        run(guest)  # internal code returns to the guest's stack pointer
        assert stolen(instance)
