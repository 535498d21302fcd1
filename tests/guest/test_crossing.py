"""Crossings on a patched KVM: their results, their costs, and intruders that are stopped.

An intruder executes VMFUNC at any address, so it enters the gate page at any byte. test_gate.py
checks the same for every byte, without a processor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.host.emulation import is_emulated
from pykvm.kernel import uapi
from pykvm.kvm import Kvm, UnexpectedExitError
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.programs import CrossingProgram, Way, way_samples
from pykvm.paging.entries import Access
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.elf import ElfFile
from tests.rigs.sources import GUESTS

pytestmark = pytest.mark.elisa

GATE = crossing.CROSSING_GVA + crossing.GATE_OFFSET
GATE_LIST = crossing.CROSSING_GVA + crossing.GATE_LIST_OFFSET
FORGED = 0x1234_5000 | 0x1E  # an EPTP: write-back, four levels


@dataclass(frozen=True)
class Registers:
    """Guest program registers.c."""

    calls: int

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "registers.c"])

    def params(self) -> list[int]:
        return [self.calls]


@dataclass(frozen=True)
class Intruder:
    """Guest program intruder.c."""

    behind: int = GATE
    slot: int = 0
    value: int = 0
    function: int = 0

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "intruder.c"])

    def params(self) -> list[int]:
        return [self.slot, self.behind, self.value, self.function]


@pytest.fixture
def counter() -> Iterator[ObjectInstance]:
    source = GUEST_SOURCES / "objects" / "counter.c"
    with SharedObject("counter", source, shared=8, window=8, guests=2).open() as instance:
        yield instance


def count_honestly(kvm: Kvm, instance: ObjectInstance, number: int, calls: int) -> int:
    with BareGuest(kvm, Registers(calls)) as guest:
        instance.attach(guest, number)
        assert guest.run() == 0
        return guest.results()[0]


def test_registers_and_flags(kvm: Kvm, counter: ObjectInstance) -> None:
    assert count_honestly(kvm, counter, 0, 100) == 500
    assert int.from_bytes(counter.shared[:8], "little") == 500
    assert count_honestly(kvm, counter, 1, 1) == 505


@pytest.mark.counted
def test_a_crossing_takes_38_instructions(kvm: Kvm) -> None:
    if not is_emulated():
        pytest.skip("the time stamp counter counts instructions on the emulated host only")
    program = CrossingProgram(calls=200, ways=[Way.EMPTY, Way.VMFUNC])
    nop = SharedObject("nop", GUEST_SOURCES / "objects" / "nop.c", guests=1)
    with nop.open() as instance, BareGuest(kvm, program) as guest:
        instance.attach(guest, 0)
        assert guest.run() == 0
        ticks = way_samples(guest.samples(), program)
    # The minimum of each: a few samples contain the host's timer interrupt.
    assert min(ticks[Way.VMFUNC]) - min(ticks[Way.EMPTY]) == 38


OWN_PAGES = Access.READ | Access.WRITE | Access.EXECUTE


def test_an_entry_that_is_a_call(kvm: Kvm, counter: ObjectInstance) -> None:
    """Entry at the address to which the gate itself jumps is a call like any other."""
    with BareGuest(kvm, Intruder(GATE + 0xFD8)) as guest:
        counter.attach(guest, 0)
        guest.map(GATE, layout.CAPTURE_GPA, 0x2000, OWN_PAGES)
        assert guest.run() == 0
        assert guest.results()[0] == 3
    assert int.from_bytes(counter.shared[:1], "little") >= 2


REFUSED = {
    "transient slot": Intruder(slot=uapi.lib.KVM_ELISA_SLOT_TRANSIENT, behind=GATE + 0x100),
    "last slot": Intruder(slot=511, behind=GATE + 0x100),
    "beyond the list": Intruder(slot=512, behind=GATE + 0x100),
    "another function": Intruder(function=1, behind=GATE + 0x100),
    "function 63": Intruder(function=63, behind=GATE + 0x100),
    "int3": Intruder(GATE + 0x800),
    "inside the lea": Intruder(GATE + 3),
    "clearing": Intruder(GATE + 0xFC2),
    "clearing, no prefix": Intruder(GATE + 0xFC3),
    "clearing, as and": Intruder(GATE + 0xFC4, value=GATE_LIST + 16),
    "clearing, the zero": Intruder(GATE + 0xFC9, value=GATE_LIST + 16),
    "load, as add": Intruder(GATE + 0xFDA, value=GATE_LIST + 16),
    "load, displacement": Intruder(GATE + 0xFDB, value=GATE_LIST + 16),
    "store, forged": Intruder(GATE + 0xFDF, value=FORGED),
    "store, list page": Intruder(GATE + 0xFDF, value=GATE_LIST + 16),
    "store, no prefix": Intruder(GATE + 0xFE0, value=FORGED),
    "store, as add": Intruder(GATE + 0xFE1, value=FORGED),
    "store, displacement": Intruder(GATE + 0xFE2, value=GATE_LIST + 16),
    "check": Intruder(GATE + 0xFE6, value=FORGED),
    "compare": Intruder(GATE + 0xFED, value=FORGED),
    "branch": Intruder(GATE + 0xFF4, value=FORGED),
    "branch, distance": Intruder(GATE + 0xFF5, value=FORGED),
    "slot number": Intruder(GATE + 0xFF6, value=FORGED),
    "slot number, as add": Intruder(GATE + 0xFF7, value=GATE_LIST + 16),
    "cld": Intruder(GATE + 0xFF9, value=FORGED),
    "fence": Intruder(GATE + 0xFFA, value=FORGED),
    "fence, as scas": Intruder(GATE + 0xFFB, value=GATE_LIST + 16),
    "fence, last byte": Intruder(GATE + 0xFFC, value=GATE_LIST + 16),
    "last vmfunc": Intruder(GATE + 0xFFD, value=FORGED),
    "last vmfunc, as add": Intruder(GATE + 0xFFE, value=GATE_LIST + 16),
    "behind the gate": Intruder(GATE + 0x1000, value=FORGED),
    "inside the sub entry": Intruder(GATE + 0x1FE0, value=FORGED),
}


@pytest.mark.attack("T2")
@pytest.mark.parametrize("name", REFUSED)
def test_an_intruder_is_stopped(kvm: Kvm, counter: ObjectInstance, name: str) -> None:
    program = REFUSED[name]
    with BareGuest(kvm, program) as guest:
        counter.attach(guest, 0)
        guest.map(GATE, layout.CAPTURE_GPA, 0x2000, OWN_PAGES)
        with pytest.raises(UnexpectedExitError) as caught:
            guest.run()
        assert guest.results()[0] == 1  # it got as far as the intrusion and no further
    exit = caught.value.exit
    assert isinstance(exit, ElisaExit)
    direct = bool(program.slot or program.function)
    assert exit.at == (uapi.lib.KVM_ELISA_AT_DEFAULT if direct else uapi.lib.KVM_ELISA_AT_GATE)
    if direct:
        assert exit.cause == uapi.lib.KVM_ELISA_EXIT_VMFUNC
        assert exit.function == program.function
        assert exit.rip == program.behind - 3
    if name == "slot number":  # the gate's own VMFUNC, with the transient slot still empty
        assert (exit.cause, exit.index) == (uapi.lib.KVM_ELISA_EXIT_VMFUNC, 1)
    # The object still serves others: one honest call of the intruder, four of a second guest.
    assert count_honestly(kvm, counter, 1, 4) == 1 + 20
