"""Objects attached to guests that call them, misuse them, and lose them."""

import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import GuestNumberError, ObjectInstance, SharedObject
from pykvm.elisa.protections import Protection
from pykvm.elisa.vcpu_attachment import InsideContextError
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Io, Kvm, MmioWrite, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.boot_info import FAILURE_PORT
from pykvm.machine.bare.failures import GuestTimeoutError
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import connect
from pykvm.measure.programs import SwitchPath
from pykvm.memory.regions import HUGE_2M
from pykvm.paging.entries import Access
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.switch import SwitchConfig
from pykvm.switch._native import lib as switch
from pykvm.switch.hosted import HostedSwitch
from tests.rigs.probe import (
    WILD,
    Probe,
    Step,
    What,
    Wild,
    calls,
    give,
    prepare,
    results,
    run,
)
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.elisa

C = crossing.CROSSING_GVA
OBJECTS = GUEST_SOURCES / "objects"


@pytest.fixture
def wild() -> Iterator[ObjectInstance]:
    with SharedObject("wild", WILD, guests=2, without={Protection.CODE_CHECK}).open() as instance:
        yield instance


def elisa_exit(exits: list[Exit]) -> ElisaExit:
    """Return the only exit."""
    (exit,) = exits
    assert isinstance(exit, ElisaExit), exit
    return exit


def number(memory: memoryview) -> int:
    return int.from_bytes(memory[:8], "little")


# ---- attachments and calls -----------------------------------------------------------------------


def test_several_guests_of_one_object(kvm: Kvm, counter: ObjectInstance) -> None:
    """Two VMs alternate: they share one memory and have a window each."""
    with ExitStack() as stack:
        guests = [stack.enter_context(BareGuest(kvm, Probe())) for _ in range(2)]
        for index, guest in enumerate(guests):
            prepare(guest)
            slot = counter.attach(guest, index + 1).slot
            steps = [calls(slot, 10**index) for _ in range(5)]
            give(guest, *steps, Step(What.READ, layout.WINDOW_GPA))
        for guest in guests:
            guest.start()
        assert [guest.wait(60) for guest in guests] == [0, 0]
        assert number(counter.shared) == 55
        for index, guest in enumerate(guests):
            values = results(guest)
            assert sorted(values[:5]) == values[:5]  # type: ignore[type-var]
            assert values[4] == values[5] == number(counter.window(index + 1))
        assert 55 in (number(counter.window(1)), number(counter.window(2)))
        assert number(counter.window(0)) == number(counter.window(3)) == 0


def test_several_objects_of_one_guest(guest: BareGuest, counter: ObjectInstance) -> None:
    with (
        SharedObject("nop", OBJECTS / "nop.c", guests=1).open() as nop,
        SharedObject("other", OBJECTS / "counter.c", guests=1).open() as other,
    ):
        slots = [instance.attach(guest).slot for instance in (counter, nop, other)]
        assert len(set(slots)) == 3
        assert min(slots) >= uapi.lib.KVM_ELISA_SLOT_FIRST
        one, nothing, two = slots
        give(guest, *(calls(slot, 7) for slot in (one, two, nothing, one, two, one)))
        assert run(guest) == []
        assert results(guest) == [7, 7, 0, 14, 14, 21]
        assert (number(counter.shared), number(other.shared)) == (21, 14)


def test_detach_and_attach_again(guest: BareGuest, counter: ObjectInstance) -> None:
    """The guest waits at its marks meanwhile, and gets the same slot again, the first free one."""
    first = counter.attach(guest)
    slot = first.slot

    def on_mark(value: int) -> None:
        if value == 0:
            first.detach()
            first.detach()  # harmless
            assert not first.attached
        else:
            assert counter.attach_vcpu(guest.vcpu, 0).slot == slot

    give(
        guest,
        calls(slot, 1),
        Step(What.MARK, 0),
        Step(What.VMFUNC, 0, slot),  # as the call would do: refused, and skipped
        Step(What.MARK, 1),
        calls(slot, 1),
    )
    exit = elisa_exit(run(guest, on_mark))
    assert (exit.function, exit.index) == (0, slot)
    values = results(guest)
    assert (values[0], values[4]) == (1, 2)


def test_a_call_of_a_detached_object(guest: BareGuest, counter: ObjectInstance) -> None:
    attachment = counter.attach(guest)
    give(guest, calls(attachment.slot, 1))
    attachment.detach()
    # run() skips the VMFUNC; after it the guest has no page, and then no code.
    exit = run(guest)[0]
    assert isinstance(exit, ElisaExit)
    assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, uapi.lib.KVM_ELISA_AT_DEFAULT)
    assert (exit.index, exit.rip) == (attachment.slot, C + PAGE_SIZE - 3)
    assert "failed vmfunc in the default context" in str(exit)
    assert number(counter.shared) == 0


def test_guest_numbers(kvm: Kvm, guest: BareGuest, counter: ObjectInstance) -> None:
    counter.attach(guest)
    with BareGuest(kvm, Probe()) as other:
        for again in (guest, other):
            with pytest.raises(GuestNumberError, match="attached already: detach it first"):
                counter.attach_vcpu(again.vcpu, 0)
        for wrong in (-1, 4):
            with pytest.raises(GuestNumberError, match="has no guest"):
                counter.attach_vcpu(other.vcpu, wrong)
        # The same guest may be two guests of the object, each with a slot of its own.
        assert counter.attach_vcpu(guest.vcpu, 3).slot == 3


# ---- VMFUNC with other numbers -------------------------------------------------------------------

REFUSED = [(0, 3), (0, 4), (0, 511), (0, 512), (0, 2**32 - 1), (1, 0), (1, 2), (63, 2)]


def test_vmfunc_numbers(guest: BareGuest, counter: ObjectInstance) -> None:
    """Slot 0 is the guest's own context; all slots without an attachment are empty.

    The transient slot is empty before calls and after them (I1). There are 512 slots and one
    function.
    """
    slot = counter.attach(guest).slot
    assert slot == 2
    refused = [(0, 1), *REFUSED]
    give(
        guest,
        Step(What.VMFUNC, 0, 0),
        *(Step(What.VMFUNC, *each) for each in refused),
        calls(slot, 1),
        Step(What.VMFUNC, 0, 1),
        calls(slot, 1),
        Step(What.VMFUNC, 0, 0),
        Step(What.VMFUNC, 0, 1),
        Step(What.VMFUNC, 64, 2),
    )
    *exits, last = run(guest)
    told = [(e.cause, e.at, e.slot, e.function, e.index) for e in exits if isinstance(e, ElisaExit)]
    assert told == [
        (uapi.lib.KVM_ELISA_EXIT_VMFUNC, uapi.lib.KVM_ELISA_AT_DEFAULT, 0, *each)
        for each in [*refused, (0, 1), (0, 1)]
    ]
    assert None not in results(guest)[:-1]
    assert number(counter.shared) == 2
    # SDM vol. 3C, 26.5.6.2: function 64 cannot exist, and the guest itself takes the exception.
    assert isinstance(last, Io)
    assert (last.port, guest.info.failure.left) == (FAILURE_PORT, 6)  # invalid opcode


# ---- limits of a sub context ---------------------------------------------------------------------

TABLES_GPA = crossing.SUB_PRIVATE_GPA + crossing.PRIVATE_TABLES_OFFSET
VIOLATIONS = {
    "write to its code": ((Wild.WRITE, C + crossing.IMAGE_OFFSET), "write", crossing.IMAGE_OFFSET),
    "write to its entry": (
        (Wild.WRITE, C + crossing.SUB_ENTRY_OFFSET),
        "write",
        crossing.SUB_ENTRY_OFFSET,
    ),
    "write to its environment": (
        (Wild.WRITE, C + crossing.ENV_OFFSET),
        "write",
        crossing.ENV_OFFSET,
    ),
    "code in its environment": ((Wild.RUN, C + crossing.ENV_OFFSET), "fetch", crossing.ENV_OFFSET),
    "code on its stack": ((Wild.RUN, C + crossing.STACK_OFFSET), "fetch", crossing.STACK_OFFSET),
    "code in the list": ((Wild.RUN, C + crossing.LIST_OFFSET), "fetch", crossing.LIST_OFFSET),
}


@pytest.mark.attack("T16")
@pytest.mark.parametrize("name", VIOLATIONS)
def test_access_that_the_sub_context_refuses(
    guest: BareGuest, wild: ObjectInstance, name: str
) -> None:
    """The address is mapped, but not with this access (I4)."""
    arguments, access, offset = VIOLATIONS[name]
    slot = wild.attach(guest).slot
    give(guest, calls(slot, *arguments, 0x90))
    exit = elisa_exit(run(guest))
    assert (exit.cause, exit.at, exit.slot) == (
        uapi.lib.KVM_ELISA_EXIT_VIOLATION,
        uapi.lib.KVM_ELISA_AT_SUB,
        slot,
    )
    assert exit.access == access
    assert (exit.gva, exit.gpa) == (C + offset, crossing.SUB_PRIVATE_GPA + offset)
    assert exit.gva_valid
    assert "in the sub context" in str(exit)


UNMAPPED = {
    "null": (Wild.READ, 0),
    "the guest's program": (Wild.READ, layout.IMAGE_GPA),
    "the guest's stack": (Wild.WRITE, layout.STACK_TOP_GPA - 8),
    "the guest's code": (Wild.RUN, layout.IMAGE_GPA),
    "the window as the guest sees it": (Wild.READ, layout.WINDOW_GPA),
    "the entry page": (Wild.READ, C + crossing.ENTRY_OFFSET),
    "the gate page": (Wild.RUN, C + crossing.GATE_OFFSET),
    "the gate's data": (Wild.READ, C + crossing.GATE_DATA_OFFSET),
    "the gate's list": (Wild.WRITE, C + crossing.GATE_LIST_OFFSET + 8),
    "below the stack": (Wild.WRITE, C + crossing.STACK_OFFSET - 8),
    "above the stack": (Wild.READ, C + crossing.STACK_OFFSET + crossing.STACK_SIZE),
    "behind the windows' large page": (Wild.READ, C + crossing.SHARED_OFFSET + HUGE_2M),
    "its own page tables": (Wild.WRITE, C + crossing.PRIVATE_TABLES_OFFSET),
    "page tables by their GPA": (Wild.WRITE, TABLES_GPA),
    # Mapped, but as user pages: SMEP refuses first; the EPT would too, without X.
    "code in shared memory": (Wild.RUN, C + crossing.SHARED_OFFSET),
}


@pytest.mark.parametrize("name", UNMAPPED)
def test_memory_that_a_sub_context_does_not_map(
    guest: BareGuest, wild: ObjectInstance, name: str
) -> None:
    """A page fault reaches no handler: the processor gives up while still in the sub context."""
    slot = wild.attach(guest).slot
    give(guest, calls(slot, *UNMAPPED[name]))
    exit = elisa_exit(run(guest))
    assert (exit.cause, exit.at, exit.slot) == (
        uapi.lib.KVM_ELISA_EXIT_REFUSED,
        uapi.lib.KVM_ELISA_AT_SUB,
        slot,
    )
    assert exit.vmx_exit_reason == 2  # triple fault
    assert results(guest) == [None]


@pytest.mark.attack("T30")
@pytest.mark.parametrize(("what", "reason"), [(Wild.CPUID, 10), (Wild.VMCALL, 18)])
def test_instructions_that_leave_the_sub_context(
    guest: BareGuest, wild: ObjectInstance, what: Wild, reason: int
) -> None:
    """KVM serves no exit from there, and the VMM sees where it came from."""
    attachment = wild.attach(guest)
    give(guest, calls(attachment.slot, what))
    exit = elisa_exit(run(guest))
    assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_REFUSED, uapi.lib.KVM_ELISA_AT_SUB)
    assert exit.vmx_exit_reason == reason
    assert C + crossing.IMAGE_OFFSET <= exit.rip < C + crossing.SHARED_OFFSET
    assert elisa_exit([guest.vcpu.run()]) == exit  # the exit repeats
    with pytest.raises(InsideContextError, match=r"or revoke\(\) the attachment"):
        attachment.detach()


def test_revoked_where_it_stopped(guest: BareGuest, wild: ObjectInstance) -> None:
    attachment = wild.attach(guest)
    give(guest, calls(attachment.slot, Wild.CPUID))
    inside = elisa_exit(run(guest))
    attachment.revoke()
    attachment.revoke()  # harmless
    assert not attachment.attached
    exit = elisa_exit([guest.vcpu.run()])
    assert (exit.cause, exit.at) == (uapi.lib.KVM_ELISA_EXIT_REVOKED, uapi.lib.KVM_ELISA_AT_SUB)
    assert (exit.slot, exit.rip) == (inside.slot, inside.rip)
    registers = guest.vcpu.get_regs()
    assert not any(getattr(registers, name) for name in ("rax", "rbx", "rcx", "rdx", "r8", "r15"))
    assert wild.attach_vcpu(guest.vcpu, 0).slot == attachment.slot  # the slot is free again


@pytest.mark.parametrize("how", ["revoke", "close"])
def test_revoked_while_it_runs(
    kvm: Kvm, guest: BareGuest, counter: ObjectInstance, how: str
) -> None:
    """A guest in an endless loop inside is revoked; other guests and objects go on.

    close() does the same.
    """
    with SharedObject("wild", WILD, guests=2, without={Protection.CODE_CHECK}).open() as wild:
        attachment = wild.attach(guest)
        give(guest, calls(attachment.slot, Wild.LOOP))
        guest.start()
        wait_for(lambda: number(wild.shared) == 1)  # the guest is inside
        getattr(attachment, how)()
        with pytest.raises(UnexpectedExitError) as caught:
            guest.wait(30)
        exit = caught.value.exit
        assert isinstance(exit, ElisaExit)
        assert (exit.cause, exit.slot) == (uapi.lib.KVM_ELISA_EXIT_REVOKED, attachment.slot)
        with BareGuest(kvm, Probe()) as other:
            prepare(other)
            give(other, calls(wild.attach(other, 1).slot, Wild.HELLO))
            assert run(other) == []
            assert results(other) == [1001]


def test_revoked_between_calls(guest: BareGuest, counter: ObjectInstance) -> None:
    attachment = counter.attach(guest)
    give(
        guest,
        calls(attachment.slot, 1),
        Step(What.MARK, 0),
        Step(What.VMFUNC, 0, attachment.slot),  # refused, and skipped
    )
    exit = elisa_exit(run(guest, lambda _: attachment.revoke()))
    assert (exit.cause, exit.index) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, attachment.slot)
    assert number(counter.shared) == 1


@pytest.mark.control("T24")
def test_a_vcpu_that_stopped_inside(guest: BareGuest, wild: ObjectInstance) -> None:
    """A vCPU stopped inside returns only by itself, and is then free again."""
    attachment = wild.attach(guest)
    give(guest, calls(attachment.slot, Wild.LOOP), calls(attachment.slot, Wild.HELLO))
    guest.start()
    with pytest.raises(GuestTimeoutError):
        guest.wait(0.3)
    assert number(wild.shared) == 1
    with pytest.raises(InsideContextError, match="run it until it is back"):
        attachment.detach()
    assert attachment.attached
    wild.shared[0] = 77  # the value that its loop waits for
    assert run(guest) == []
    assert results(guest) == [77, 1000]
    attachment.detach()
    assert not attachment.attached


# ---- page tables of the guest's own making (T5, I3) ----------------------------------------------

PRESENT_WRITABLE = 3


def crafted_tables(guest: BareGuest, gpa: int) -> bytes:
    """Return page tables that are right at `gpa`: the guest's own, except for the crossing area.

    There, gate page and sub page are a page of the guest's that kills it.

    Returns:
        Five pages: the tables from the root on, then that page.
    """
    pml4 = bytearray(guest.memory.read(layout.PAGE_TABLES_GPA, PAGE_SIZE))

    def put(page: bytearray, index: int, target: int) -> None:
        struct.pack_into("<Q", page, 8 * index, target | PRESENT_WRITABLE)

    pages = [pml4, *(bytearray(PAGE_SIZE) for _ in range(3))]
    for level, page in zip((4, 3, 2), pages, strict=False):
        put(page, C >> 12 + 9 * (level - 1) & 511, gpa + (5 - level) * PAGE_SIZE)
    first = C >> 12 & 511
    put(pages[3], first, layout.ENTRY_PAGE_GPA)
    put(pages[3], first + 1, gpa + 4 * PAGE_SIZE)
    put(pages[3], first + 2, gpa + 4 * PAGE_SIZE)
    put(pages[3], first + 3, layout.RETURN_PAGE_GPA)
    return b"".join(pages) + b"\x0f\x0b" * (PAGE_SIZE // 2)  # ud2


def test_page_tables_in_the_window(guest: BareGuest) -> None:
    """CR3 names a window full of crafted tables, and still the official code runs.

    In gate and sub context that address holds the context's own root, like any other.
    """
    declaration = SharedObject("counter", OBJECTS / "counter.c", window=6 * PAGE_SIZE, guests=2)
    with declaration.open() as counter:
        slot = counter.attach(guest).slot
        cr3 = layout.WINDOW_GPA + PAGE_SIZE  # the counter itself writes to the first page
        tables = crafted_tables(guest, cr3)
        counter.window(0)[PAGE_SIZE : PAGE_SIZE + len(tables)] = tables
        give(guest, Step(What.CALL_WITH_CR3, 5, slot=slot, cr3=cr3), calls(slot, 5))
        assert run(guest) == []
        assert results(guest) == [5, 10]
        assert counter.window(0)[PAGE_SIZE + 8 * (C >> 39 & 511)] & 0x20  # accessed


def test_page_tables_where_the_sub_context_has_the_window(guest: BareGuest) -> None:
    """CR3 names the address of the window in the sub context, where a walk would find the tables.

    The gate context maps nothing there, so the guest stops in it.
    """
    declaration = SharedObject("counter", OBJECTS / "counter.c", window=6 * PAGE_SIZE, guests=2)
    with declaration.open() as counter:
        slot = counter.attach(guest).slot
        gpa = crossing.SUB_MEMORY_GPA + declaration.windows_offset
        guest.add_region(counter.window_region(0, gpa))
        cr3 = gpa + PAGE_SIZE
        tables = crafted_tables(guest, cr3)
        counter.window(0)[PAGE_SIZE : PAGE_SIZE + len(tables)] = tables
        give(guest, Step(What.CALL_WITH_CR3, 5, slot=slot, cr3=cr3))
        exit = elisa_exit(run(guest))
        assert (exit.cause, exit.at, exit.slot) == (
            uapi.lib.KVM_ELISA_EXIT_VIOLATION,
            uapi.lib.KVM_ELISA_AT_GATE,
            slot,
        )
        assert exit.gpa >> 12 == cr3 >> 12
        assert exit.rip == C + crossing.GATE_OFFSET  # no instruction of the gate has run
        assert number(counter.shared) == 0


@pytest.mark.attack("T16")
def test_page_tables_of_a_context_from_outside(guest: BareGuest, wild: ObjectInstance) -> None:
    """The guest's default context has no memory at the address of the contexts' tables."""
    wild.attach(guest)
    gva = 0x1234_5678_9000
    guest.map(gva, TABLES_GPA, PAGE_SIZE, Access.READ | Access.WRITE)
    give(guest, Step(What.WRITE, gva, 0xDEAD))
    (exit,) = run(guest)
    assert exit == MmioWrite(TABLES_GPA, struct.pack("<Q", 0xDEAD))


# ---- the switch ----------------------------------------------------------------------------------


def test_a_switch_call_with_bad_requests(kvm: Kvm) -> None:
    """Bad requests are refused or dropped, and counted by reason.

    They name foreign ports or unknown operations, or frames too short or too long.
    """
    config = SwitchConfig(ports=2, lane_slots=16, tx_slots=16)
    with HostedSwitch(config) as hosted, BareGuest(kvm, Probe()) as guest:
        connect(guest, hosted, 0, SwitchPath.VMFUNC)
        hosted.switch.enable(1)
        slot = guest.info.attachment[0].gate_slot
        lengths = [60, 13, 0, config.frame_limit + 1, 2**32 - 1, config.frame_limit, 14]
        window = hosted.instance.window(0)
        frame = b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x88\xb5"
        for number, length in enumerate(lengths):
            struct.pack_into("<I", window, 0x400 + 4 * number, length)
            at = 0x3000 + number * 2048
            window[at : at + len(frame)] = frame
        send = switch.SWITCH_OP_SEND
        give(
            guest,
            calls(slot, send | 1 << 8, 0, 1),  # port 1 is not this guest's
            calls(slot, send | 255 << 8, 0, 1),
            calls(slot, 9, 0, 1),  # no such operation
            calls(slot, send, 0, 257),  # more than a burst
            calls(slot, send, 0, len(lengths)),
        )
        assert run(guest) == []
        values = [value - 2**64 if value and value >> 63 else value for value in results(guest)]
        assert values == [-1, -1, -22, -22, len(lengths)]  # EPERM, EINVAL
        counters = hosted.switch.counters()
        own = counters.ports[0]
        assert (own.foreign_port, own.bad_request) == (2, 2)
        assert (own.frames, own.too_short, own.too_long, own.broadcast) == (7, 2, 2, 3)
        assert counters.lanes[0][1].delivered == 3
        assert counters.check() == []
