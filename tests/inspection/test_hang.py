"""pykvm.inspection.hang and watch: reports on guests that make no progress."""

import threading

import pytest

from pykvm.inspection.hang import Sample, compare, report, sample, state
from pykvm.inspection.watch import ProgressWatch
from pykvm.kvm import Kvm
from tests.rigs.inspected.machine import InspectedMachine, NewMachine, address_of
from tests.rigs.waiting import wait_for

DEAD = "halted for ever, interrupts off"


@pytest.mark.kvm
@pytest.mark.native
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
    before = machine.word("counters")
    wait_for(lambda: machine.word("counters") > before)  # it runs on


@pytest.mark.kvm
@pytest.mark.native
def test_a_report_on_an_instruction_that_is_not_mapped(kvm: Kvm) -> None:
    machine = InspectedMachine(kvm)
    machine.vcpus[0].set_regs(rip=0x1234_5678_9000)
    text = report(machine)
    assert "instruction at 0x123456789000: not mapped by the guest" in text
    assert text.endswith("nothing: entry 0x24 at level 4 is absent")


@pytest.mark.kvm
@pytest.mark.native
def test_a_report_on_a_vcpu_that_is_closed(kvm: Kvm) -> None:
    machine = InspectedMachine(kvm)
    machine.vcpus[0].close()
    text = report(machine)
    assert "no registers: " in text
    assert "  none: " in text


@pytest.mark.kvm
@pytest.mark.native
def test_the_last_exits_are_told(new_machine: NewMachine) -> None:
    machine = new_machine(entry="printing")
    wait_for(lambda: len(machine.output) > 20)
    assert "KVM_EXIT_IO 0x10 " in report(machine)


@pytest.mark.kvm
@pytest.mark.native
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
@pytest.mark.native
def test_a_guest_that_spins(new_machine: NewMachine) -> None:
    machine = new_machine()
    before, counted = sample(machine), machine.word("counters")
    wait_for(lambda: machine.word("counters") > counted)
    found = compare(before, sample(machine))
    assert not found.dead
    assert found.stuck[0].startswith("spins near 0x100")


@pytest.mark.kvm
@pytest.mark.native
def test_a_guest_that_uses_a_device_is_not_stuck(new_machine: NewMachine) -> None:
    machine = new_machine(entry="printing")
    before = sample(machine)
    printed = len(machine.output)
    wait_for(lambda: len(machine.output) > printed + 1)
    assert compare(before, sample(machine)).stuck == {}


@pytest.mark.kvm
@pytest.mark.native
def test_sampling_disturbs_nothing(machine: InspectedMachine) -> None:
    stop = threading.Event()

    def samples() -> None:
        while not stop.wait(0.002):  # without a pause the vCPUs would hardly get to run
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


def told(machine: InspectedMachine, text: str, **options: float) -> list[str]:
    """Return what a watch has told, once there is something with this text."""
    said: list[str] = []
    with ProgressWatch(machine, said.append, interval=0.02, **options):  # type: ignore[arg-type]
        wait_for(lambda: any(text in each for each in said))
        threading.Event().wait(0.2)
    return said


@pytest.mark.kvm
@pytest.mark.native
def test_a_dead_guest_is_reported_once(new_machine: NewMachine) -> None:
    machine = new_machine(entry="dead", irqchip=True)
    said = told(machine, DEAD)
    assert len(said) == 1
    assert said[0].startswith("the guest cannot go on: vcpu 0 halted for ever, interrupts off\n")
    assert "page walk of the instruction:" in said[0]


@pytest.mark.kvm
@pytest.mark.native
def test_a_guest_that_spins_is_reported_once(machine: InspectedMachine) -> None:
    said = told(machine, "spins near", patience=2)
    assert len(said) == 1
    assert said[0].startswith("the guest makes no progress: vcpu 0 spins near 0x100")


@pytest.mark.kvm
@pytest.mark.native
def test_nothing_is_told_of_a_guest_that_works_or_is_paused(
    machine: InspectedMachine, new_machine: NewMachine
) -> None:
    working = new_machine(entry="printing")
    said: list[str] = []
    with machine.gate.paused():
        printed = len(working.output)
        with (
            # The interval is long enough for some output in each.
            ProgressWatch(working, said.append, interval=0.3, patience=1),
            ProgressWatch(machine, said.append, interval=0.02, patience=1),
        ):
            threading.Event().wait(1)
            wait_for(lambda: len(working.output) > printed + 10)
    assert said == []


@pytest.mark.kvm
@pytest.mark.native
def test_a_watch_ends_with_the_machine(new_machine: NewMachine) -> None:
    machine = new_machine()
    watch = ProgressWatch(machine, lambda _: None, interval=0.01)
    machine.stop()
    wait_for(lambda: not watch.running)
    watch.close()
    watch.close()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("before", "after", "stuck"),
    [
        (Sample("runs", 0x1000, 0, 5), Sample("runs", 0x1080, 0, 5), True),
        (Sample("runs", 0x1000, 0, 5), Sample("runs", 0x1080, 0, 6), False),  # a device was used
        (Sample("runs", 0x1000, 0, 5), Sample("runs", 0x9000, 0, 5), False),  # it computes
        (Sample("runs", 0x1000, 3, 5), Sample("runs", 0x1080, 3, 5), False),  # a program computes
        (Sample("halted", 0x1000, 0, 5), Sample("halted", 0x1000, 0, 5), False),  # it waits
        (Sample("runs", 0x1000, 0, 5), Sample("halted", 0x1000, 0, 5), False),
        (Sample("runs", 0x1000, 0, 5), Sample(DEAD, 0x1000, 0, 5), True),
    ],
)
def test_signs_of_progress(before: Sample, after: Sample, stuck: bool) -> None:
    found = compare({0: before}, {0: after})
    assert bool(found.stuck) is stuck
    assert found.dead is (after.state == DEAD)
