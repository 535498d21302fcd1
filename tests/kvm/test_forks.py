"""Handles in a forked process: the child gives back its copies without disturbing the parent."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pykvm.devices.debug_console import DebugConsole
from pykvm.kvm import ForkedProcessError, Hlt, Kvm, Vcpu
from tests.rigs.forks import in_fork
from tests.rigs.messages import one_line
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.kvm

SPIN = "40 EB FD ; again: inc ax; jmp again"


@pytest.fixture
def running(guest: RealModeGuest) -> Iterator[RealModeGuest]:
    """Run the guest in another thread throughout the test's forks."""
    guest.load(SPIN)
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    wait_until_running(guest.vcpu)
    yield guest
    assert guest.vcpu.running
    guest.vcpu.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert guest.vcpu.get_regs().rax & 0xFFFF


def wait_until_running(vcpu: Vcpu) -> None:
    end = time.monotonic() + 20
    while not vcpu.running:
        assert time.monotonic() < end, "the vcpu did not start"
        time.sleep(0.001)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_closing_in_the_child(running: RealModeGuest) -> None:
    """Descriptors and the mapping of the run area go; the parent's guest runs on."""
    handles = [running.vm.kvm, running.vm, running.vcpu, running.vm.stats()]
    numbers = [handle.fileno() for handle in handles]

    def body() -> None:
        running.vm.close()
        running.vm.kvm.close()
        running.vm.close()  # harmless twice
        assert [is_open(number) for number in numbers] == [False] * 4
        assert all(handle.closed for handle in handles)
        with open("/proc/self/maps") as maps:
            assert "kvm-vcpu" not in maps.read()

    in_fork(body)
    assert [is_open(number) for number in numbers] == [True] * 4


def test_a_lock_that_a_thread_held_at_the_fork(guest: RealModeGuest) -> None:
    """Threads that start and stop the vCPU keep taking its locks while children close it."""
    guest.load(SPIN)
    done = threading.Event()

    def runner() -> None:
        while not done.is_set():
            guest.vcpu.run()

    def stopper() -> None:
        while not done.is_set():
            guest.vcpu.stop()

    threads = [threading.Thread(target=target) for target in (runner, stopper, stopper)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            in_fork(guest.vm.close)
    finally:
        done.set()
        guest.vcpu.stop()
        for thread in threads:
            thread.join(20)
    assert not guest.vcpu.closed


def test_calls_in_the_child_say_what_to_do(running: RealModeGuest) -> None:
    console = DebugConsole()
    console.attach(running.vm.handlers)
    vm, vcpu = running.vm, running.vcpu

    def body() -> None:
        for call in (
            vcpu.run,
            vcpu.stop,
            vcpu.get_regs,
            lambda: vcpu.reply(0),
            lambda: vcpu.kvm_run,
            vcpu.complete,
            vm.create_vcpu,
            lambda: vm.set_user_memory_region(1, 0x100000, 0x1000, running.host_address),
            lambda: vm.handlers.add_ports(0x80, 1, 1),
            console.read,
        ):
            with pytest.raises(ForkedProcessError, match="make it in the process") as caught:
                call()
            one_line(caught.value)
        assert not vcpu.running
        assert vcpu.exit_counts().returned == {}

    in_fork(body)


def test_a_child_makes_vms_of_its_own(guest: RealModeGuest) -> None:
    """/dev/kvm itself belongs to no process: an inherited `Kvm` works."""
    kvm = guest.vm.kvm
    assert isinstance(kvm, Kvm)

    def body() -> None:
        with kvm.create_vm() as vm:
            mine = RealModeGuest(vm)
            mine.load("B0 05 F4 ; mov al, 5; hlt")
            assert run(mine.vcpu) == Hlt()
            assert mine.vcpu.get_regs().rax & 0xFF == 5
            in_fork(vm.close)  # also in a child
            assert run(mine.vcpu) is not None

    in_fork(body)


def test_counters_can_be_read_in_the_child(guest: RealModeGuest) -> None:
    stats = guest.vm.stats()
    in_fork(lambda: None if stats.read() else pytest.fail("no counters"))


def test_forgotten_handles_are_not_the_childs_fault(guest: RealModeGuest) -> None:
    """The child raises no ResourceWarning, because the parent closes the handles."""
    code = """if True:
        import os, sys, warnings
        from pykvm.kvm import Kvm
        warnings.simplefilter("error")
        kvm = Kvm(); vm = kvm.create_vm(); vcpu = vm.create_vcpu(0)
        child = os.fork()
        if not child:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        vm.close(); kvm.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "vm.close(); os._exit(0)", "del vcpu, vm; sys.exit(0)"]
)
def test_the_interpreters_own_end(end: str) -> None:
    """A child exits normally while the parent's guest runs, and so does the parent after it."""
    code = f"""if True:
        import ctypes, mmap, os, sys, threading, time
        from pykvm.kvm import Kvm
        kvm = Kvm(); vm = kvm.create_vm()
        memory = mmap.mmap(-1, 0x10000); memory[0x1000:0x1002] = b"\\xeb\\xfe"
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, 0, 0x10000, address)
        vcpu = vm.create_vcpu(0)
        sregs = vcpu.get_sregs(); sregs.cs.base = sregs.cs.selector = 0; vcpu.set_sregs(sregs)
        vcpu.set_regs(rip=0x1000, rflags=0x202)
        threading.Thread(target=vcpu.run, daemon=True).start()
        while not vcpu.running: time.sleep(0.001)
        child = os.fork()
        if not child:
            {end}
        assert os.waitpid(child, 0)[1] == 0
        assert vcpu.running
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=True)
