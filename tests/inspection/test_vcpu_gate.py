"""pykvm.inspection.vcpu_gate: pausing a machine whose vCPUs run."""

import fcntl
import os
import select
import threading

import pytest

from pykvm.devices.serial import Serial
from pykvm.inspection.vcpu_gate import PauseError, VcpuGate
from pykvm.kvm import Debug, Io, Kvm, Vcpu
from tests.rigs.inspected.machine import InspectedMachine, NewMachine, address_of
from tests.rigs.messages import one_line
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.kvm, pytest.mark.native]


def counters(machine: InspectedMachine) -> list[int]:
    return [machine.word("counters", number) for number in range(len(machine.vcpus))]


def wait_until_all_run(machine: InspectedMachine) -> None:
    before = counters(machine)
    wait_for(lambda: all(a < b for a, b in zip(before, counters(machine), strict=True)))


def stands(machine: InspectedMachine) -> bool:
    before = counters(machine)
    threading.Event().wait(0.05)
    return counters(machine) == before


def test_a_paused_machine_stands_and_goes_on(machine: InspectedMachine) -> None:
    for _ in range(20):
        wait_until_all_run(machine)
        with machine.gate.paused():
            assert machine.gate.is_paused
            registers = [vcpu.get_regs().rbx for vcpu in machine.vcpus]
            assert not any(vcpu.running for vcpu in machine.vcpus)
            # The counter is stored right after RBX has been incremented.
            assert all(r - c in (0, 1) for r, c in zip(registers, counters(machine), strict=True))
        assert not machine.gate.is_paused
    with machine.gate.paused():
        assert stands(machine)


def test_pauses_nest(machine: InspectedMachine) -> None:
    machine.gate.pause()
    machine.gate.pause()
    machine.gate.resume()
    assert stands(machine)
    machine.gate.resume()
    wait_until_all_run(machine)
    with pytest.raises(PauseError, match="not paused") as caught:
        machine.gate.resume()
    one_line(caught.value)


def test_one_vcpu_is_held_and_the_other_runs(machine: InspectedMachine) -> None:
    wait_until_all_run(machine)
    machine.gate.hold([1])
    machine.gate.settle()
    first, second = counters(machine)
    wait_for(lambda: machine.word("counters") > first)
    assert machine.word("counters", 1) == second
    machine.vcpus[1].get_regs()
    with machine.gate.paused():  # two reasons, each taken back on its own
        machine.gate.release([1])
        assert stands(machine)
    wait_until_all_run(machine)


def test_a_machine_paused_before_it_starts_stands(kvm: Kvm) -> None:
    with InspectedMachine(kvm, cpus=2) as machine:
        machine.gate.pause()
        machine.start()
        assert stands(machine)
        assert counters(machine) == [0, 0]
        machine.gate.resume()
        wait_until_all_run(machine)


def test_pauses_and_resumes_from_several_threads(machine: InspectedMachine) -> None:
    def pause() -> None:
        for _ in range(100):
            with machine.gate.paused():
                assert not any(vcpu.running for vcpu in machine.vcpus)

    threads = [threading.Thread(target=pause) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    wait_until_all_run(machine)


def test_an_access_is_finished_before_the_vcpu_is_parked(new_machine: NewMachine) -> None:
    """The instruction after the last OUT comes next, and no byte is lost or written twice."""
    machine = new_machine(entry="printing")
    for _ in range(50):
        wait_for(lambda: machine.output)
        with machine.gate.paused():
            count = machine.vcpus[0].get_regs().rbx
            assert len(machine.output) - count in (0, 1)
            assert bytes(machine.output[:256]) == bytes(range(min(len(machine.output), 256)))


def test_a_vcpus_own_thread_cannot_wait_for_itself(kvm: Kvm) -> None:
    with InspectedMachine(kvm, entry="printing") as machine:
        caught: list[BaseException] = []

        def serve(found: object) -> None:
            assert isinstance(found, Io)
            with pytest.raises(PauseError, match="another thread") as error:
                machine.gate.pause()
            caught.append(error.value)
            machine.gate.close()

        machine.gate.run(machine.vcpus[0], serve)
        one_line(caught[0])


def test_a_closed_gate_lets_parked_and_running_vcpus_return(new_machine: NewMachine) -> None:
    machine = new_machine(cpus=3)
    machine.gate.hold([1])
    machine.gate.settle()
    machine.gate.close()
    machine.gate.close()
    assert machine.gate.closed
    with pytest.raises(PauseError, match="has ended") as caught:
        machine.gate.pause()
    one_line(caught.value)


def test_one_debugger_at_a_time() -> None:
    gate, first, second = VcpuGate(), _Listener(), _Listener()
    gate.attach(first)
    assert gate.is_debugged
    with pytest.raises(PauseError, match="another debugger") as caught:
        gate.attach(second)
    one_line(caught.value)
    later = threading.Timer(0.1, gate.detach)
    later.start()
    gate.attach(second)  # it waits until the first has gone
    gate.close()
    gate.close()
    assert (first.ended, second.ended) == (0, 1)
    gate.detach()
    assert not gate.is_debugged


class _Listener:
    def __init__(self) -> None:
        self.ended = 0

    def debug_exit(self, vcpu: Vcpu, found: Debug) -> None:
        raise AssertionError

    def machine_ended(self) -> None:
        self.ended += 1


def test_a_device_that_does_not_answer(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvm.inspection.vcpu_gate._PATIENCE", 0.1)
    inside, answer = threading.Event(), threading.Event()
    gate = VcpuGate()

    def serve(_found: object) -> None:
        inside.set()
        answer.wait(30)
        gate.close()

    with InspectedMachine(kvm, entry="printing") as machine:
        thread = threading.Thread(target=gate.run, args=(machine.vcpus[0], serve))
        thread.start()
        assert inside.wait(30)
        with pytest.raises(PauseError, match="vcpu 0 does not stop") as caught:
            gate.pause()
        one_line(caught.value)
        assert not gate.is_paused
        answer.set()
        thread.join(30)
        assert not thread.is_alive()


def test_a_guest_that_waits_for_a_reader(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output goes from inside the run loop, which does not stop while nobody takes it."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    serial = Serial(writer)
    over = threading.Event()

    def read_all() -> None:
        while not over.is_set():
            if select.select([reader], [], [], 0.01)[0]:
                os.read(reader, 65536)

    reads = threading.Thread(target=read_all)
    with InspectedMachine(kvm, entry="printing") as machine:
        machine.vcpus[0].set_regs(rip=address_of("printing_serially"))
        serial.attach(machine.vm.handlers)
        machine.start()
        try:
            wait_for(lambda: not select.select([], [writer], [], 0)[1])
            threading.Event().wait(0.5)  # the guest waits as soon as it writes again
            monkeypatch.setattr("pykvm.inspection.vcpu_gate._PATIENCE", 0.3)
            with pytest.raises(PauseError, match="nobody reads what it writes") as caught:
                machine.gate.pause()
            one_line(caught.value)
            monkeypatch.undo()
            reads.start()
            with machine.gate.paused():
                assert stands(machine)
        finally:
            serial.stop()
            machine.gate.close()
            over.set()
            if reads.ident:
                reads.join()
    serial.close()
    os.close(reader)
    os.close(writer)
