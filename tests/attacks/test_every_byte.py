"""T2 at all 4096 bytes of the gate page: one VMFUNC each, with random registers.

The VMM plays the guest's kernel: it writes VMFUNC into the guest's own page in front of the byte,
sets all registers, and runs the vCPU. The outcome must be one that I2 allows. `make verify-gate`
shows the same for all registers by proof; here the built page runs.
"""

import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.calls import Context, revoke_slot, set_slot
from pykvm.elisa.exits import ElisaExit
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Io, Kvm, Shutdown, Stopped
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.leap import OWN_PAGES
from tests.rigs.attacks.victim import (
    AT_DEFAULT,
    AT_GATE,
    KNOCK,
    WINDOW,
    C,
    join,
    knocks,
    still_serves,
    untouched,
    vault,
)

pytestmark = pytest.mark.elisa

VMFUNC: Final = b"\x0f\x01\xd4"
HOME_PORT: Final = 0x77
OUT: Final = bytes([0xE6, HOME_PORT])  # replaces the code of the return page
GATE: Final = C + crossing.GATE_OFFSET
SUB_ENTRY: Final = C + crossing.SUB_ENTRY_OFFSET
TRANSIENT: Final = uapi.lib.KVM_ELISA_SLOT_TRANSIENT
IN_LIST: Final = C + crossing.GATE_LIST_OFFSET

GENERAL: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{n}" for n in range(8, 16)),
)
# CF, PF, AF, ZF, SF, DF, OF, NT, AC, ID; interrupts stay enabled.
FLAGS: Final = 0x24_4CD5
FLAGS_ALWAYS: Final = 0x202
# Addresses that this context maps or that an attacker would try, and odd numbers.
TEMPTING: Final = (
    *(IN_LIST + n for n in (0, 8, 16, -8)),
    *(C + crossing.GATE_DATA_OFFSET, GATE, GATE + 0xFD8, SUB_ENTRY, WINDOW),
    *(0, 1, TRANSIENT, 0x1000 | 0x1E, (1 << 64) - 1, 1 << 63),
)


def tempting_registers(choice: random.Random, slot: int) -> dict[str, int]:
    """Return values for all registers but EAX and ECX, the operands of VMFUNC.

    RDI names no operation that stores anything.
    """
    values = {
        name: choice.choice(TEMPTING) if choice.random() < 0.5 else choice.getrandbits(64)
        for name in GENERAL
    }
    values["rax"] = values["rax"] >> 32 << 32
    values["rcx"] = (values["rcx"] >> 32 << 32) | slot
    return values


class Intruder:
    """A guest whose next VMFUNC may be in front of any byte of the gate page."""

    def __init__(self, guest: BareGuest) -> None:
        self._guest = guest
        guest.map(GATE, layout.RX_LOG_GPA, PAGE_SIZE, OWN_PAGES)
        guest.memory.write(layout.RX_LOG_GPA, b"\xcc" * PAGE_SIZE)
        guest.memory.write(layout.RETURN_PAGE_GPA, OUT)
        self._progress = 0

    def enter(self, offset: int, registers: Mapping[str, int], flags: int = 0) -> Exit:
        """Execute a VMFUNC followed by the instruction at byte `offset` of the gate page."""
        memory = self._guest.memory
        places = [self._place(offset - len(VMFUNC) + n) for n in range(len(VMFUNC))]
        before = [memory.read(place, 1) for place in places]
        for place, byte in zip(places, VMFUNC, strict=True):
            memory.write(place, bytes([byte]))
        exit = self.go(GATE + offset - len(VMFUNC), registers, flags)
        for place, content in zip(places, before, strict=True):
            memory.write(place, content)
        return exit

    @staticmethod
    def _place(offset: int) -> int:
        """Return the GPA of the guest's own memory there: its entry page or the page after that."""
        if offset >= 0:
            return layout.RX_LOG_GPA + offset
        return layout.ENTRY_PAGE_GPA + PAGE_SIZE + offset

    def go(self, rip: int, registers: Mapping[str, int], flags: int = 0) -> Exit:
        """Run from `rip` to the next exit."""
        rflags = FLAGS_ALWAYS | (flags & FLAGS)
        self._guest.vcpu.set_regs(rip=rip, rflags=rflags, **registers)
        self._progress += 1
        return self._guest.vcpu.run()

    def take_home(self, slot: int, gate: Context) -> None:
        """Take the vCPU out of the gate in `slot`, which it may enter again."""
        revoke_slot(self._guest.vm, self._guest.vcpu.id, slot)
        exit = self._guest.vcpu.run()
        assert isinstance(exit, ElisaExit), exit
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_REVOKED
        set_slot(self._guest.vcpu, slot, gate)

    @contextmanager
    def not_for_ever(self, patience: float = 5.0) -> Iterator[None]:
        """Stop code that loops in a context: run() then returns Stopped."""
        over = threading.Event()

        def watch() -> None:
            seen = -1
            while not over.wait(patience):
                if self._progress == seen:
                    self._guest.vcpu.stop()
                seen = self._progress

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


IN_GATE: Final = {
    uapi.lib.KVM_ELISA_EXIT_VIOLATION: "violation in the gate",
    uapi.lib.KVM_ELISA_EXIT_VMFUNC: "failed VMFUNC in the gate",
    uapi.lib.KVM_ELISA_EXIT_REFUSED: "trap in the gate",
}
LOOPS: Final = "loops in the gate"
HOME: Final = "called and returned"  # to the return page: KVM serves no I/O elsewhere
OWN: Final = "back in the guest's own pages"


def end_of(exit: Exit) -> str | None:
    """Return the name of an outcome that I2 allows; None for any other."""
    match exit:
        case ElisaExit(at=at, cause=cause) if at == AT_GATE:
            return IN_GATE.get(cause)
        case Io(port=port) if port == HOME_PORT:
            return HOME
        case Shutdown():
            return OWN
        case Stopped():
            return LOOPS
    return None


@pytest.mark.attack("T2")
def test_every_byte_of_the_gate(kvm: Kvm, guest: BareGuest) -> None:
    """After each attempt the vCPU can call, and the transient slot is empty.

    A vCPU that stopped in the gate is taken home: nobody can set where it goes on there.
    """
    choice = random.Random(2)
    ends: Counter[str] = Counter()
    with vault() as instance:
        attachment = join(guest, instance)
        slot = attachment.slot
        _, gate = attachment.vcpus[0]._contexts
        intruder = Intruder(guest)
        honest = dict.fromkeys(GENERAL, 0) | {"rcx": slot, "rdi": KNOCK}
        with intruder.not_for_ever():
            for offset in range(PAGE_SIZE):
                registers, flags = tempting_registers(choice, slot), choice.getrandbits(32)
                exit = intruder.enter(offset, registers, flags)
                end = end_of(exit)
                assert end, f"{exit}, entered at byte {offset:#x} with {registers}"
                ends[end] += 1

                before = knocks(instance)
                if end not in (HOME, OWN):
                    intruder.take_home(slot, gate)
                stray = intruder.enter(PAGE_SIZE - 1, honest | {"rcx": TRANSIENT})
                assert isinstance(stray, ElisaExit), f"{stray} after byte {offset:#x}"
                assert (stray.at, stray.cause) == (AT_DEFAULT, uapi.lib.KVM_ELISA_EXIT_VMFUNC)
                again = intruder.enter(0, honest)
                assert end_of(again) == HOME, f"{again} after byte {offset:#x} with {registers}"
                assert knocks(instance) == before + 1
        assert untouched(instance)
        assert still_serves(kvm, instance)
    print(f"bytes of the gate page, by what followed: {dict(ends)}")
    assert ends[HOME] >= 1
    assert (
        ends[IN_GATE[uapi.lib.KVM_ELISA_EXIT_REFUSED]] > PAGE_SIZE / 2
    )  # most of the page is int3
