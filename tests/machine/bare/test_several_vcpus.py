"""Bare-metal guests with several vCPUs: their stacks, their results, their failures."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.failures import (
    GuestAssertionError,
    GuestFaultError,
    GuestTimeoutError,
    VcpusFullError,
)
from pykvm.machine.bare.guest import BareGuest
from pykvm.toolchain.elf import ElfFile
from tests.rigs.messages import one_line
from tests.rigs.sources import GUESTS
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.kvm

FINISH, FAIL, LOOP, FAULT, MEET, FAIL_TOGETHER = range(6)


@dataclass(frozen=True)
class Crew:
    """Guest program crew.c; its head lists what a vCPU may do."""

    does: Sequence[int]

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "crew.c"])

    def params(self) -> list[int]:
        return list(self.does)


def crew(kvm: Kvm, *does: int) -> BareGuest:
    return BareGuest(kvm, Crew(does), vcpus=len(does))


def test_each_has_a_number_and_a_stack(kvm: Kvm) -> None:
    """All of them are at work at the same time: each waits for the others."""
    count = layout.MAX_VCPUS
    with crew(kvm, *[MEET] * count) as guest:
        assert [vcpu.id for vcpu in guest.vcpus] == list(range(count))
        guest.start()
        assert guest.wait(60) == 1  # the first status that is not 0
        for number, address in enumerate(guest.results()[:count]):
            top = layout.stack_top(number)
            assert top - layout.STACK_SIZE < address < top
        assert guest.results()[count : 2 * count] == [count] * count
        assert layout.stack_top(count - 1) - layout.STACK_SIZE == layout.STACK_GPA


def test_statuses(kvm: Kvm) -> None:
    with crew(kvm, FINISH, FINISH, FINISH) as guest:
        assert guest.run() == 0
        assert guest.run(number=2) == 2
        guest.start()
        assert guest.threads.started == [0, 1, 2]
        assert guest.wait(60, numbers=[0]) == 0
        assert guest.wait(60, numbers=[2]) == 2
        assert guest.threads.started == [1]
        with pytest.raises(RuntimeError, match="vcpu 0 has not been started"):
            guest.wait(60, numbers=[0, 1])
        with pytest.raises(RuntimeError, match="vcpu 1 runs already"):
            guest.start()
        assert guest.threads.started == [1]
        assert guest.wait(60) == 1


def test_a_program_for_one_vcpu(kvm: Kvm) -> None:
    """The other vCPUs have nothing to do."""

    class One(Crew):
        def image(self) -> ElfFile:
            return build_guest([GUESTS / "selftest.c"])

    with BareGuest(kvm, One([4, 7]), vcpus=3) as guest:
        guest.start()
        assert guest.wait(60) == 7


def test_they_wait_for_the_first(kvm: Kvm) -> None:
    with crew(kvm, FINISH, FINISH) as guest:
        guest.start(numbers=[1])
        with pytest.raises(GuestTimeoutError):
            guest.wait(0.2)
        assert guest.run() == 0
        assert guest.run(number=1) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_fails_stops_the_others(kvm: Kvm, number: int) -> None:
    does = [LOOP, LOOP, LOOP]
    does[number] = FAIL
    with crew(kvm, *does) as guest:
        guest.start()
        with pytest.raises(GuestAssertionError, match="the guest asserts number == 100"):
            guest.wait()
        assert not any(vcpu.running for vcpu in guest.vcpus)
        assert guest.threads.started == []


def test_an_exception_of_the_second(kvm: Kvm) -> None:
    with crew(kvm, LOOP, FAULT) as guest:
        guest.start()
        with pytest.raises(GuestFaultError) as caught:
            guest.wait(60)
        assert (caught.value.vector, caught.value.cr2) == (14, 8)


def test_two_that_fail_at_once(kvm: Kvm) -> None:
    """Each error has what its own vCPU reported."""
    with crew(kvm, FAIL_TOGETHER, FAIL_TOGETHER) as guest:
        guest.start()
        for number in (1, 0):
            with pytest.raises(GuestAssertionError, match=f"{number:#x} and 0x64"):
                guest.wait(60, numbers=[number])


def test_some_that_do_not_finish(kvm: Kvm) -> None:
    with crew(kvm, FINISH, LOOP, LOOP) as guest:
        guest.start()
        with pytest.raises(GuestTimeoutError) as caught:
            guest.wait(0.5)
        text = one_line(caught.value)
        assert text.startswith("the guest did not finish in 0.5 s: vcpu 1 was stopped at rip 0x1")
        assert "; vcpu 2 was stopped at rip 0x1" in text
        assert "vcpu 0" not in text
        guest.start(numbers=[1, 2])  # they go on, and close() stops them
        wait_for(lambda: guest.vcpus[1].running and guest.vcpus[2].running)


def test_added_later(kvm: Kvm) -> None:
    """Also while the first one runs."""
    with crew(kvm, LOOP) as guest:
        guest.start()
        wait_for(lambda: guest.info.result[8] == 1)
        vcpu = guest.add_vcpu()
        assert guest.vcpus[1] is vcpu
        guest.start(numbers=[1])
        assert guest.wait(60, numbers=[1]) == 1
        assert guest.results()[9] == 2
        assert guest.vcpu.running


def test_too_many(kvm: Kvm) -> None:
    with crew(kvm, *[FINISH] * layout.MAX_VCPUS) as guest:
        with pytest.raises(VcpusFullError, match=f"has {layout.MAX_VCPUS} vcpus already"):
            guest.add_vcpu()
        assert len(guest.vcpus) == layout.MAX_VCPUS
    for wrong in (0, layout.MAX_VCPUS + 1):
        with pytest.raises(VcpusFullError, match=f"use 1 to {layout.MAX_VCPUS}"):
            BareGuest(kvm, Crew([]), vcpus=wrong)


def test_with_interrupt_controllers(kvm: Kvm) -> None:
    """No vCPU waits for INIT and SIPI."""
    with BareGuest(kvm, Crew([MEET, MEET]), vcpus=2, irqchip=True) as guest:
        guest.start()
        assert guest.wait(60) == 1
