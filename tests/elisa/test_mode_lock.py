"""I5: VMFUNC works only in the mode that the contexts were built for; elsewhere it is an invalid
opcode for the guest, and works again when the mode is back."""

import errno
import struct
from collections.abc import Callable

import pytest

from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Hlt, IoctlError, Shutdown, Struct
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.paging.entries import Access
from pykvm.sizes import PAGE_SIZE
from tests.rigs.probe import Step, What, faults, give, results, run

pytestmark = pytest.mark.elisa

INVALID_OPCODE = 6
# SDM vol. 3A 2.5.
PE, ET, NE, WP, PG = 1 << 0, 1 << 4, 1 << 5, 1 << 16, 1 << 31
PSE, PAE, PGE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 20, 1 << 21
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
CR0 = PE | ET | NE | WP | PG
CR4 = PAE | SMEP | SMAP  # of these guests


def try_vmfunc(index: int = 0) -> Step:
    """Slot 0 is where the guest is already: where VMFUNC works, nothing happens."""
    return Step(What.VMFUNC, 0, index, attempt=True)


def try_call(slot: int) -> Step:
    return Step(What.CALL, 1, slot=slot, attempt=True)


# ---- what the guest changes itself ---------------------------------------------------------------


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
    """The switch follows every change, in both directions."""
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
    """Contexts rely on none of these."""
    slot = counter.attach(guest).slot
    give(guest, Step(What.WRITE_CONTROL, register, value), try_vmfunc(), try_call(slot))
    assert run(guest) == []
    assert faults(guest) == [None] * 3
    assert results(guest)[2] == 1


def test_bits_that_nobody_has_in_long_mode(guest: BareGuest, counter: ObjectInstance) -> None:
    """PAE and paging cannot be turned off by 64-bit code (SDM vol. 3A, 10.8.5.4): the guest has to
    leave 64-bit mode first, as below."""
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
    """The list comes while SMAP is off."""

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


# ---- modes that the vCPU is put into -------------------------------------------------------------

CODE = 0x9_5000  # free memory behind the stack, in reach of real mode: VMFUNC(0, index), then HLT
LONG_MODE_CODE = 0x6000_0000  # the same page, executable in the guest's own tables
TABLES = layout.CAPTURE_GPA + 0x20_0000


def _flat(segment: Struct, *, long: bool, bits32: bool, limit: int) -> None:
    segment.base = segment.selector = 0
    segment.selector = 8
    segment.limit = limit
    segment.l, segment.db, segment.g = int(long), int(bits32), int(limit > 0xFFFFF)


def _set_mode(guest: BareGuest, cr0: int, cr4: int, efer: int, cr3: int, *, long: bool) -> None:
    sregs = guest.vcpu.get_sregs()
    real = not cr0 & PE
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        code = name == "cs" and long
        _flat(segment, long=code, bits32=not code and not real, limit=0xFFFF if real else 2**32 - 1)
        if real:
            segment.type = 3
    if real:
        sregs.cs.base, sregs.cs.selector = CODE, CODE >> 4
    sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3 = cr0, cr4, efer, cr3
    sregs.idt.limit = 0  # an exception becomes a triple fault
    guest.vcpu.set_sregs(sregs)


def _two_level(guest: BareGuest) -> int:
    """32-bit paging: 4 MiB pages, GVA = GPA."""
    entries = [number << 22 | 0x83 for number in range(1024)]
    guest.memory.write(TABLES, struct.pack("<1024I", *entries))
    return TABLES


def _pae(guest: BareGuest) -> int:
    """Four page directories with 2 MiB pages, GVA = GPA (SDM vol. 3A, 4.4)."""
    pointers = [TABLES + (1 + number) * 0x1000 | 1 for number in range(4)]
    guest.memory.write(TABLES, struct.pack("<4Q", *pointers))
    entries = [number << 21 | 0x83 for number in range(2048)]
    guest.memory.write(TABLES + 0x1000, struct.pack("<2048Q", *entries))
    return TABLES


Mode = Callable[[BareGuest], None]

OFF: dict[str, Mode] = {
    "real mode": lambda g: _set_mode(g, ET | NE, 0, 0, 0, long=False),
    "real mode with SMAP": lambda g: _set_mode(g, ET | NE, CR4, 0, 0, long=False),
    "protected mode": lambda g: _set_mode(g, CR0 & ~PG, 0, 0, 0, long=False),
    "long mode enabled, no paging": lambda g: _set_mode(
        g, CR0 & ~PG, CR4, LME | NXE, 0, long=False
    ),
    "32-bit paging": lambda g: _set_mode(g, CR0, PSE | SMAP, 0, _two_level(g), long=False),
    "PAE paging": lambda g: _set_mode(g, CR0, PAE | SMAP, NXE, _pae(g), long=False),
    "64-bit mode without SMAP": lambda g: _set_mode(
        g, CR0, CR4 & ~SMAP, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=True
    ),
}
ON: dict[str, Mode] = {
    "64-bit mode": lambda g: _set_mode(
        g, CR0, CR4, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=True
    ),
    # I5 leaves it on: trusted GVAs lie where 32-bit addresses do not reach.
    "compatibility mode": lambda g: _set_mode(
        g, CR0, CR4, LME | LMA | NXE, g.vcpu.get_sregs().cr3, long=False
    ),
}


def vmfunc_in(guest: BareGuest, mode: Mode, index: int) -> Exit:
    """How VMFUNC(0, index) ends there: with HLT if it worked, with a shutdown if it was invalid.

    Afterwards the vCPU is as it was.
    """
    vcpu = guest.vcpu
    vcpu.complete()
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    mode(guest)
    now = vcpu.get_sregs()
    code = LONG_MODE_CODE if now.efer & LMA else CODE if now.cr0 & PE else 0
    guest.memory.write(CODE, bytes.fromhex("0F01D4 F4"))
    vcpu.set_regs(rip=code, rax=0, rcx=index, rsp=layout.STACK_TOP_GPA, rflags=0x202)
    exit = vcpu.run()
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    return exit


def _in_mode(guest: BareGuest, counter: ObjectInstance, mode: Mode) -> list[Exit]:
    """VMFUNC to the default context, to the gate and to an empty slot, in the middle of a run that
    calls the object before and behind it."""
    slot = counter.attach(guest).slot
    guest.map(LONG_MODE_CODE, CODE, PAGE_SIZE, Access.READ | Access.EXECUTE)
    give(guest, try_call(slot), Step(What.MARK), try_call(slot))
    seen: list[Exit] = []
    assert run(guest, lambda _: seen.extend(vmfunc_in(guest, mode, i) for i in (0, 1))) == []
    assert results(guest) == [1, 0, 2]
    return seen


@pytest.mark.attack("T7")
@pytest.mark.parametrize("name", OFF)
def test_modes_without_vmfunc(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    assert _in_mode(guest, counter, OFF[name]) == [Shutdown(), Shutdown()]


@pytest.mark.parametrize("name", ON)
def test_modes_with_vmfunc(guest: BareGuest, counter: ObjectInstance, name: str) -> None:
    """What the test above tells from: it works, or the VMM is told of the empty slot."""
    works, empty = _in_mode(guest, counter, ON[name])
    assert works == Hlt()
    assert isinstance(empty, ElisaExit)
    assert (empty.cause, empty.index) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, 1)


# ---- five-level paging ---------------------------------------------------------------------------


@pytest.mark.attack("T7")
def test_a_list_for_five_levels(guest: BareGuest, counter: ObjectInstance) -> None:
    """In a guest with four, VMFUNC stays off; and a list is for one kind."""
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
