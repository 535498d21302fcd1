"""pykvm.machine.linux.pause: vCPUs stop, wait, and go on; those that cannot stop are named."""

import fcntl
import os
import select
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from pykvm.devices.serial import Serial
from pykvm.kvm import Kvm, Stopped, Vcpu
from pykvm.machine.linux.pause import PauseError, PauseGate
from tests.rigs.messages import one_line
from tests.rigs.real_mode import RealModeGuest
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.kvm


class Machine:
    """A guest that counts, in a thread that passes the gate as those of a Linux machine do."""

    def __init__(self, guest: RealModeGuest) -> None:
        self.guest = guest
        self.gate = PauseGate()
        self.ended = False
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.gate.member():
            while True:
                exit = self.guest.vcpu.run()
                assert exit == Stopped()
                if not self.gate.passed():
                    break
        self.ended = True

    @property
    def vcpus(self) -> list[Vcpu]:
        return [self.guest.vcpu]

    @property
    def count(self) -> int:
        return int.from_bytes(self.guest.memory[0x2000:0x2004], "little")

    def counts(self) -> None:
        now = self.count
        wait_for(lambda: self.count != now)

    def rests(self) -> None:
        now = self.count
        time.sleep(0.1)
        assert self.count == now

    def end(self) -> None:
        self.gate.end()
        self.guest.vcpu.stop()
        if self.thread.ident:
            self.thread.join(20)
            assert self.ended


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Machine]:
    with kvm.create_vm() as vm:
        vm.set_tss_address(0xFFFBD000)
        guest = RealModeGuest(vm)
        guest.load("66 FF 06 00 20 EB F9 ; inc dword [0x2000]; jmp to it")
        made = Machine(guest)
        yield made
        made.end()


def test_paused_and_resumed(machine: Machine) -> None:
    machine.thread.start()
    for _ in range(20):
        machine.counts()
        machine.gate.close(machine.vcpus)
        machine.rests()
        machine.gate.close(machine.vcpus)  # harmless twice
        assert machine.guest.vcpu.get_regs().rip in (0x1000, 0x1005)
        machine.gate.open(machine.vcpus)
        machine.gate.open(machine.vcpus)
    machine.counts()


def test_paused_before_it_has_begun(machine: Machine) -> None:
    machine.gate.close(machine.vcpus)
    machine.thread.start()
    machine.rests()
    assert machine.count == 0
    machine.gate.open(machine.vcpus)
    machine.counts()


def test_for_a_while(machine: Machine) -> None:
    machine.thread.start()
    machine.counts()
    with machine.gate.closed(machine.vcpus):
        machine.rests()
        with machine.gate.closed(machine.vcpus):
            machine.rests()
        machine.rests()
    machine.counts()


def test_ended_while_it_is_paused(machine: Machine) -> None:
    machine.thread.start()
    machine.counts()
    machine.gate.close(machine.vcpus)
    machine.end()
    machine.rests()
    with pytest.raises(PauseError, match="the machine has ended") as caught:
        machine.gate.close(machine.vcpus)
    one_line(caught.value)
    machine.gate.open(machine.vcpus)
    machine.rests()


def test_opened_by_somebody_else(machine: Machine) -> None:
    """Who saves the machine is not disturbed by who resumes it."""
    machine.thread.start()
    machine.counts()
    machine.gate.close(machine.vcpus)
    with machine.gate.closed(machine.vcpus):
        machine.gate.open(machine.vcpus)
        machine.rests()
        machine.gate.close(machine.vcpus)
        machine.gate.open(machine.vcpus)
        machine.rests()
    machine.counts()


def waiting_bytes(reader: int) -> int:
    raw = fcntl.ioctl(reader, termios.FIONREAD, bytes(4))
    return int.from_bytes(raw, "little")


def test_a_guest_that_waits_for_a_reader(kvm: Kvm) -> None:
    """Output goes from inside the run loop, which does not stop while nobody takes it."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    serial = Serial(writer)
    over = threading.Event()

    def read_all() -> None:
        while not over.is_set():
            if select.select([reader], [], [], 0.01)[0]:
                os.read(reader, 65536)

    with kvm.create_vm() as vm:
        vm.set_tss_address(0xFFFBD000)
        guest = RealModeGuest(vm)
        serial.attach(vm.handlers)
        guest.load("""
            BA F8 03     ; mov dx, 0x3F8
            B9 00 04     ; next: mov cx, 0x400
            BE 00 60     ; mov si, 0x6000
            F3 6E        ; rep outsb
            EB F6        ; jmp next
        """)
        machine = Machine(guest)
        machine.thread.start()
        reads = threading.Thread(target=read_all)
        try:
            wait_for(lambda: waiting_bytes(reader) == 4096)  # no more fit into the pipe
            time.sleep(0.5)  # the guest waits as soon as it writes again
            with pytest.raises(PauseError, match="1 processors of the guest do not stop") as caught:
                machine.gate.close(machine.vcpus, 0.3)
            one_line(caught.value)
            reads.start()
            machine.gate.close(machine.vcpus)
            machine.gate.open(machine.vcpus)
        finally:
            serial.stop()
            machine.end()
            over.set()
            if reads.ident:
                reads.join()
    serial.close()
    os.close(reader)
    os.close(writer)
