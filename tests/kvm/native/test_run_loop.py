"""pykvm.kvm.vcpu and run_loop.c: exits, replies, and stopping without a race."""

import errno
import os
import random
import signal
import threading
import time

import pytest

from pykvm.devices.debug_console import DebugConsole
from pykvm.kvm import (
    HandleClosedError,
    Hlt,
    Hypercall,
    Io,
    IoctlError,
    Kvm,
    ReplyError,
    Shutdown,
    Stopped,
    VcpuRunningError,
    Vm,
    lib,
)
from tests.rigs.messages import one_line
from tests.rigs.needs import need, need_hardware
from tests.rigs.real_mode import CODE, RealModeGuest, deadline, run
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.kvm


SPIN = """
    40     ; inc ax
    EB FD  ; jmp $-1
"""


# ---- exits and replies --------------------------------------------------------------------------


def test_port_output_and_input(guest: RealModeGuest) -> None:
    guest.load("""
        B8 34 12     ; mov ax, 0x1234
        BA 00 05     ; mov dx, 0x500
        EF           ; out dx, ax
        ED           ; in ax, dx
        A3 00 60     ; mov [0x6000], ax
        F4           ; hlt
    """)
    assert run(guest.vcpu) == Io(0x500, 2, 1, True, b"\x34\x12")
    assert run(guest.vcpu) == Io(0x500, 2, 1, False, b"")
    guest.vcpu.reply(0xCAFE)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6002] == b"\xfe\xca"


def test_reply_in_bytes(guest: RealModeGuest) -> None:
    guest.load("E5 10 A3 00 60 F4 ; in ax, 0x10; mov [0x6000], ax; hlt")
    assert run(guest.vcpu) == Io(0x10, 2, 1, False, b"")
    with pytest.raises(ReplyError, match="pass 2") as caught:
        guest.vcpu.reply(b"\1")
    one_line(caught.value)
    guest.vcpu.reply(b"\1\2")
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6002] == b"\1\2"


def test_reply_where_none_is_wanted(guest: RealModeGuest) -> None:
    guest.load("F4")
    assert run(guest.vcpu) == Hlt()
    with pytest.raises(ReplyError, match="KVM_EXIT_HLT takes no such reply") as caught:
        guest.vcpu.reply(1)
    one_line(caught.value)
    with pytest.raises(ReplyError, match="KVM_EXIT_HLT cannot fault") as caught:
        guest.vcpu.reply_fault()
    one_line(caught.value)


def test_repeated_output_is_one_exit_or_several(guest: RealModeGuest) -> None:
    guest.memory[0x6000:0x6008] = b"abcdefgh"
    guest.load("""
        BE 00 60     ; mov si, 0x6000
        B9 08 00     ; mov cx, 8
        BA 00 05     ; mov dx, 0x500
        F3 6E        ; rep outsb
        F4           ; hlt
    """)
    data = b""
    while isinstance(found := run(guest.vcpu), Io):
        assert (found.port, found.size, found.is_write) == (0x500, 1, True)
        assert len(found.data) == found.count
        data += found.data
    assert found == Hlt()
    assert data == b"abcdefgh"


def test_complete_finishes_a_port_read(guest: RealModeGuest) -> None:
    guest.load("E4 10 F4 ; in al, 0x10; hlt")
    assert isinstance(run(guest.vcpu), Io)
    guest.vcpu.reply(0x5A)
    guest.vcpu.complete()
    regs = guest.vcpu.get_regs()
    assert regs.rax & 0xFF == 0x5A
    assert regs.rip == CODE + 2
    assert run(guest.vcpu) == Hlt()


def test_triple_fault(guest: RealModeGuest) -> None:
    """The fault is injected: a KVM that interprets the guest emulates no exceptions."""
    need(guest.vm, "KVM_CAP_X86_TRIPLE_FAULT_EVENT")
    guest.vm.enable_cap("KVM_CAP_X86_TRIPLE_FAULT_EVENT", 1)
    guest.load(SPIN)
    events = guest.vcpu.get_vcpu_events()
    events.triple_fault.pending = 1
    events.flags |= lib.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    guest.vcpu.set_vcpu_events(events)
    assert run(guest.vcpu) == Shutdown()


def test_unexpected_exit_says_where(guest: RealModeGuest) -> None:
    guest.load("B0 7B E6 80 F4 ; mov al, 0x7B; out 0x80, al; hlt")
    found = run(guest.vcpu)
    error = guest.vcpu.unexpected(found)
    assert "out port 0x80" in one_line(error)
    assert error.exit is found
    assert "real mode" in error.report
    assert "KVM_EXIT_IO 0x80 0x7b (returned)" in error.report
    assert "instruction at 0x100" in error.report  # before or after the OUT: KVM's choice


def test_counts_and_history(guest: RealModeGuest) -> None:
    DebugConsole().attach(guest.vm.handlers)
    guest.load("""
        B0 41  ; mov al, 'A'
        E6 E9  ; out 0xE9, al
        E6 E9  ; out 0xE9, al
        E6 10  ; out 0x10, al
        F4     ; hlt
    """)
    assert isinstance(run(guest.vcpu), Io)
    assert run(guest.vcpu) == Hlt()
    counts = guest.vcpu.exit_counts()
    assert counts.native == {"KVM_EXIT_IO": 2}
    assert counts.returned == {"KVM_EXIT_IO": 1, "KVM_EXIT_HLT": 1}
    assert counts.runs >= 4
    past = guest.vcpu.last_exits()
    assert [(p.name, p.native, p.first) for p in past] == [
        ("KVM_EXIT_IO", True, 0xE9),
        ("KVM_EXIT_IO", True, 0xE9),
        ("KVM_EXIT_IO", False, 0x10),
        ("KVM_EXIT_HLT", False, 0),
    ]
    assert past[0].second == ord("A")


def test_history_keeps_the_last_sixteen(guest: RealModeGuest) -> None:
    DebugConsole().attach(guest.vm.handlers)
    guest.load("""
        B0 00  ; mov al, 0
        E6 E9  ; again: out 0xE9, al
        FE C0  ; inc al
        3C 1E  ; cmp al, 30
        75 F8  ; jne again
        F4     ; hlt
    """)
    assert run(guest.vcpu) == Hlt()
    past = guest.vcpu.last_exits()
    assert len(past) == lib.PYKVM_HISTORY == 16
    assert [p.second for p in past[:-1]] == list(range(15, 30))
    assert past[-1].name == "KVM_EXIT_HLT"


# ---- hypercalls (with handlers: tests/elisa/test_calls.py) --------------------------------------


def test_a_hypercall_of_stock_kvm(guest: RealModeGuest) -> None:
    """KVM_HC_MAP_GPA_RANGE (12) is the hypercall that stock KVM passes to user space."""
    if not need(guest.vm, "KVM_CAP_EXIT_HYPERCALL") & 1 << 12:
        pytest.skip("this kvm keeps KVM_HC_MAP_GPA_RANGE to itself")
    need_hardware("hypercalls in real mode")
    guest.vm.enable_cap("KVM_CAP_EXIT_HYPERCALL", 1 << 12)
    guest.load(f"""
        {hypercall()}
        66 A3 00 60  ; mov [0x6000], eax
        F4           ; hlt
    """)
    guest.vcpu.set_regs(rax=12, rbx=0x4000, rcx=1, rdx=0)
    assert run(guest.vcpu) == Hypercall(12, (0x4000, 1, 0, 0, 0, 0), False)
    guest.vcpu.reply(0x55)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6004] == b"\x55\0\0\0"


def hypercall() -> str:
    """Return VMCALL on Intel, VMMCALL elsewhere; KVM would patch the wrong one if it can."""
    with open("/proc/cpuinfo") as cpuinfo:
        return "0F 01 C1" if "GenuineIntel" in cpuinfo.read() else "0F 01 D9"


# ---- stopping -----------------------------------------------------------------------------------


def test_stop_before_run_is_not_lost(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    for _ in range(20):
        guest.vcpu.stop()
        assert run(guest.vcpu) == Stopped()


def test_several_stops_are_one(guest: RealModeGuest) -> None:
    guest.load("F4")
    guest.vcpu.stop()
    guest.vcpu.stop()
    assert guest.vcpu.run() == Stopped()
    assert run(guest.vcpu) == Hlt()


def test_a_stop_outlives_another_exit(guest: RealModeGuest) -> None:
    """A stop between an exit's return and the next run is reported by that next run."""
    guest.load("E6 10 F4 ; out 0x10, al; hlt")
    assert isinstance(run(guest.vcpu), Io)
    guest.vcpu.stop()
    assert guest.vcpu.run() == Stopped()
    assert run(guest.vcpu) == Hlt()


def test_the_guest_goes_on_after_a_stop(guest: RealModeGuest) -> None:
    guest.load("""
        B9 FF FF  ; mov cx, 0xFFFF
        40        ; again: inc ax
        E2 FD     ; loop again
        F4        ; hlt
    """)
    guest.vcpu.stop()
    assert guest.vcpu.run() == Stopped()
    assert run(guest.vcpu, 60) == Hlt()
    assert guest.vcpu.get_regs().rax & 0xFFFF == 0xFFFF


def test_stops_at_random_moments(guest: RealModeGuest) -> None:
    """Each of 500 stops, before, at and after entry, causes one return; none is lost."""
    guest.load(SPIN)
    chance = random.Random(1)
    stops = 500
    answered = threading.Semaphore(0)
    failures: list[object] = []

    def runner() -> None:
        pause = random.Random(2)
        for _ in range(stops):
            if pause.random() < 0.5:
                time.sleep(pause.random() * 0.0005)
            found = guest.vcpu.run()
            if found != Stopped():
                failures.append(found)
            answered.release()

    thread = threading.Thread(target=runner)
    thread.start()
    for number in range(stops):
        if chance.random() < 0.7:
            time.sleep(chance.random() * 0.001)
        guest.vcpu.stop()
        assert answered.acquire(timeout=20), f"stop {number} was lost"
    thread.join(20)
    assert not thread.is_alive()
    assert failures == []
    assert guest.vcpu.exit_counts().interrupted >= stops


def test_stopping_a_thread_that_ended(guest: RealModeGuest) -> None:
    """A stop after the running thread has ended sends no signal and waits for the next run."""
    guest.load(SPIN)
    for _ in range(50):
        thread = threading.Thread(target=guest.vcpu.run)
        thread.start()
        guest.vcpu.stop()
        guest.vcpu.stop()
        thread.join(20)
        assert not thread.is_alive()
        guest.vcpu.stop()
    assert not guest.vcpu.running
    assert run(guest.vcpu) == Stopped()


def test_many_stoppers(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    done = threading.Event()

    def stopper() -> None:
        while not done.is_set():
            guest.vcpu.stop()
            time.sleep(0.0001)

    threads = [threading.Thread(target=stopper) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert guest.vcpu.run() == Stopped()
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_thread_that_blocks_every_signal_stops_too(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    found: list[object] = []

    def runner() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        found.append(guest.vcpu.run())

    thread = threading.Thread(target=runner)
    thread.start()
    wait_for(lambda: guest.vcpu.running)
    guest.vcpu.stop()
    thread.join(20)
    assert found == [Stopped()]


def test_interrupt_from_the_keyboard(guest: RealModeGuest) -> None:
    guest.load("""
        FF 06 00 20  ; inc word [0x2000]
        EB FA        ; jmp $-4
    """)

    # A shell's background jobs have SIGINT ignored, and Python leaves it so.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        wait_for(lambda: any(guest.memory[0x2000:0x2002]))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with deadline(guest.vcpu), pytest.raises(KeyboardInterrupt):
            guest.vcpu.run()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not guest.vcpu.running
    guest.vcpu.stop()
    assert guest.vcpu.run() == Stopped()  # still usable


def test_python_signal_handlers_run_and_the_guest_goes_on(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    seen: list[int] = []

    def handler(number: int, _frame: object) -> None:
        seen.append(number)
        guest.vcpu.stop()

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert run(guest.vcpu) == Stopped()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert seen == [signal.SIGUSR1]


# ---- other threads ------------------------------------------------------------------------------


def test_state_of_a_running_vcpu_is_refused(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    try:
        wait_for(lambda: guest.vcpu.running)
        for call in (
            guest.vcpu.get_regs,
            guest.vcpu.run,
        ):
            with pytest.raises(VcpuRunningError, match=r"stop\(\)") as caught:
                call()
            one_line(caught.value)
    finally:
        guest.vcpu.stop()
        thread.join(20)
    assert guest.vcpu.get_regs().rip in (CODE, CODE + 1)


def test_closing_stops_the_runner(guest: RealModeGuest) -> None:
    guest.load(SPIN)
    caught: list[Exception] = []

    def runner() -> None:
        try:
            guest.vcpu.run()
        except HandleClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=runner)
    thread.start()
    wait_for(lambda: guest.vcpu.running)
    fd = guest.vcpu.fileno()
    guest.vm.close()  # closes its vCPUs first
    thread.join(20)
    assert not thread.is_alive()
    assert len(caught) == 1
    assert guest.vcpu.closed
    with pytest.raises(OSError, match="Bad file descriptor") as gone:
        os.fstat(fd)
    assert gone.value.errno == errno.EBADF


def test_use_after_close(guest: RealModeGuest) -> None:
    vcpu = guest.vcpu
    vcpu.close()
    vcpu.close()
    vcpu.stop()
    for call in (vcpu.run, vcpu.get_regs):
        with pytest.raises(HandleClosedError, match="create another one"):
            call()
    assert vcpu.exit_counts().runs == 0


def test_closing_gives_everything_back(kvm: Kvm) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with kvm.create_vm() as vm:
        guest = RealModeGuest(vm)
        guest.vcpu.stats()
        vm.stats()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert "kvm-vcpu" not in maps.read()


def test_vcpu_ids(vm: Vm) -> None:
    vm.create_vcpu(0)
    vm.create_vcpu(3)
    with pytest.raises(IoctlError, match="use each vcpu id once") as caught:
        vm.create_vcpu(3)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.ioctl == "KVM_CREATE_VCPU"


def test_two_vcpus_run_at_once(vm: Vm) -> None:
    first = RealModeGuest(vm)
    first.load(SPIN)
    second = vm.create_vcpu(1)
    sregs = second.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    second.set_sregs(sregs)
    second.set_regs(rip=CODE, rflags=0x202)
    threads = [threading.Thread(target=vcpu.run) for vcpu in (first.vcpu, second)]
    for thread in threads:
        thread.start()
    wait_for(lambda: first.vcpu.running and second.running)
    second.stop()
    threads[1].join(20)
    assert first.vcpu.running
    first.vcpu.stop()
    threads[0].join(20)
    assert not first.vcpu.running
