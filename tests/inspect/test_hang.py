"""pykvm.inspect.hang: reports on guests that make no progress."""

import threading

import pytest

from pykvm.inspect.hang import Sample, compare, report, sample, state
from pykvm.kvm import Kvm
from tests.inspect.conftest import NewMachine
from tests.rigs.inspected.machine import InspectedMachine, address_of
from tests.rigs.waiting import wait_for

DEAD = "halted for ever, interrupts off"


@pytest.mark.kvm
def test_a_report_says_where_each_vcpu_is(machine: InspectedMachine) -> None:
    wait_for(lambda: machine.word("counters", 1))
    text = report(machine)
    first, second = text.split("\n\n")
    assert first.startswith("vcpu 0: runs\n64-bit mode, cpl 0, rip 0x100")
    assert second.startswith("vcpu 1: runs\n")
    for part in (first, second):
        lines = part.splitlines()
        assert any(line.startswith("rax ") for line in lines)
        assert any(line.startswith("instruction at 0x100") for line in lines)
        assert "last exits, oldest first:" in lines
        walk = lines[lines.index("page walk of the instruction:") + 1 :]
        assert walk[0] == "  cr3 0x1000: 4 levels"
        assert walk[-1].startswith("  GVA 0x100")
        assert walk[-1].endswith("[rwxs 2M WB]")
    wait_for(lambda: compare(sample(machine), sample(machine)))  # it runs on


@pytest.mark.kvm
def test_a_report_on_an_instruction_that_is_not_mapped(kvm: Kvm) -> None:
    machine = InspectedMachine(kvm)
    machine.vcpus[0].set_regs(rip=0x1234_5678_9000)
    text = report(machine)
    assert "instruction at 0x123456789000: not mapped by the guest" in text
    assert text.endswith("nothing: entry 0x24 at level 4 is absent")


@pytest.mark.kvm
def test_a_report_on_a_vcpu_that_is_closed(kvm: Kvm) -> None:
    machine = InspectedMachine(kvm)
    machine.vcpus[0].close()
    text = report(machine)
    assert "no registers: " in text
    assert "  none: " in text


@pytest.mark.kvm
def test_the_last_exits_are_told(new_machine: NewMachine) -> None:
    machine = new_machine(entry="printing")
    wait_for(lambda: len(machine.output) > 20)
    assert "KVM_EXIT_IO 0x10 " in report(machine)


@pytest.mark.kvm
def test_a_guest_that_waits_for_no_interrupt_is_dead(new_machine: NewMachine) -> None:
    machine = new_machine(entry="dead", irqchip=True, cpus=2)
    wait_for(lambda: sample(machine)[0].state == DEAD)
    found = compare(sample(machine), sample(machine))
    assert found.dead
    assert found.stuck == {0: DEAD}  # the other has never been started
    assert report(machine).startswith(f"vcpu 0: {DEAD}\n")
    with machine.gate.paused():
        assert state(machine.vcpus[1]) == "waits to be started"


@pytest.mark.kvm
def test_a_guest_that_spins(new_machine: NewMachine) -> None:
    machine = new_machine()
    before = sample(machine)
    wait_for(lambda: machine.word("counters") > 100)
    found = compare(before, sample(machine))
    assert not found.dead
    assert found.stuck[0].startswith("spins near 0x100")


@pytest.mark.kvm
def test_a_guest_that_uses_a_device_is_not_stuck(new_machine: NewMachine) -> None:
    machine = new_machine(entry="printing")
    before = sample(machine)
    wait_for(lambda: len(machine.output) > 10)
    assert compare(before, sample(machine)).stuck == {}


@pytest.mark.kvm
def test_sampling_disturbs_nothing(machine: InspectedMachine) -> None:
    stop = threading.Event()

    def samples() -> None:
        while not stop.is_set():
            sample(machine)

    thread = threading.Thread(target=samples)
    thread.start()
    before = machine.word("counters", 1)
    wait_for(lambda: machine.word("counters", 1) > before + 1000)
    stop.set()
    thread.join(30)
    with machine.gate.paused():
        regs = machine.vcpus[0].get_regs()
        assert regs.rbx - machine.word("counters") in (0, 1)
    assert address_of("_start") <= regs.rip <= address_of("stored")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("before", "after", "stuck"),
    [
        (Sample("runs", 0x1000, 5), Sample("runs", 0x1080, 5), True),
        (Sample("runs", 0x1000, 5), Sample("runs", 0x1080, 6), False),  # a device was used
        (Sample("runs", 0x1000, 5), Sample("runs", 0x9000, 5), False),  # it computes
        (Sample("halted", 0x1000, 5), Sample("halted", 0x1000, 5), False),  # it waits
        (Sample("runs", 0x1000, 5), Sample("halted", 0x1000, 5), False),
        (Sample("runs", 0x1000, 5), Sample(DEAD, 0x1000, 5), True),
    ],
)
def test_signs_of_progress(before: Sample, after: Sample, stuck: bool) -> None:
    found = compare({0: before}, {0: after})
    assert bool(found.stuck) is stuck
    assert found.dead is (after.state == DEAD)
