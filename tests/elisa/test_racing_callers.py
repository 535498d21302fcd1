"""T25: many threads make the patch's calls on the same VM at once, and close it meanwhile.

A call may lose a race and fail with one of a few errors. Nothing may leak, the kernel's log has to
be quiet, and a crossing has to work afterwards. The kernel is made fully preemptible if it can be
at run time, so that even one processor switches between two callers at any point.
"""

import ctypes
import errno
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pykvm.kernel import uapi
from pykvm.kvm import Kvm, lib
from tests.rigs.context_requests import PAGE, raw, register, with_part
from tests.rigs.host_state import nothing_stays, quiet_kernel
from tests.rigs.tiny_guest import (
    ARENA_PAGES,
    Arena,
    Kind,
    context_request,
    create_context,
    crossings_work,
    enable,
    prepare,
    revoke,
    set_memory,
    set_registers,
    set_slot,
)

pytestmark = pytest.mark.elisa

ROUNDS = 12
ACTIONS = 14
"""Actions of each thread in each round."""

PREEMPTION = Path("/sys/kernel/debug/sched/preempt")

# A descriptor may be closed, and its number already belong to another file.
CLOSED = {errno.EBADF, errno.ENOTTY, errno.EINVAL}
ALLOWED = {
    # The memory is gone, the limit is reached, or the target of an EPTP page has become a gate.
    "create": CLOSED | {errno.EFAULT, errno.ENOSPC, errno.ELOOP},
    "register": {errno.EFAULT},
    "set slot": CLOSED | {errno.EBUSY},
    "revoke": CLOSED | {errno.ENOENT},
    "enable": CLOSED,
    "run": CLOSED | {errno.EINTR, errno.EFAULT},
    "registers": CLOSED | {errno.EBUSY},
    "memory": CLOSED | {errno.EEXIST},
}
EXITS = {
    uapi.lib.KVM_EXIT_ELISA,
    lib.KVM_EXIT_HLT,
    lib.KVM_EXIT_SHUTDOWN,  # VMFUNC is #UD, or the memory is fresh and empty
    lib.KVM_EXIT_MMIO,  # no memory there at the moment
    lib.KVM_EXIT_INTERNAL_ERROR,
    lib.KVM_EXIT_INTR,
    lib.KVM_EXIT_UNKNOWN,  # another thread has just begun to run the same vCPU
}
SLOTS = (2, 3, 511)


@pytest.fixture
def _preemptible() -> Iterator[None]:
    """Make the kernel preemptible and shorten Python's switch interval; restore both afterwards."""
    interval = sys.getswitchinterval()
    before = ""
    if PREEMPTION.exists():
        before = PREEMPTION.read_text().split("(")[1].split(")")[0]
        PREEMPTION.write_text("full")
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(interval)
    if before:
        PREEMPTION.write_text(before)


class Round:
    """One VM with two vCPUs, and threads that do random things to it."""

    def __init__(self, kvm: Kvm, seed: int, outcomes: Counter[str]) -> None:
        self.seed = seed
        self.outcomes = outcomes
        self.failures: list[str] = []
        self.arena = Arena()
        self.vm = raw(kvm.fileno(), "KVM_CREATE_VM")
        assert enable(self.vm, uapi.lib.KVM_ELISA_CONTEXTS, 12) == 0
        assert set_memory(self.vm, self.arena.address) == 0
        self.vcpus = [raw(self.vm, "KVM_CREATE_VCPU", number) for number in range(2)]
        self.areas = [mmap.mmap(vcpu, kvm.get_vcpu_mmap_size()) for vcpu in self.vcpus]
        for vcpu in self.vcpus:
            prepare(kvm, vcpu)
            assert set_registers(vcpu, slot=2) == 0
        self.kvm = kvm.fileno()
        self.memories: list[int] = []
        self.contexts: list[int] = []
        """Descriptors; the thread that removes one closes it."""
        self.owned = [self.vm, *self.vcpus]
        """Descriptors of the VM and its vCPUs, under the same rule."""
        for vcpu_id, vcpu in enumerate(self.vcpus):
            self._attach(vcpu_id, vcpu)

    def _attach(self, vcpu_id: int, vcpu: int) -> None:
        """Put an object into slot 2 and a gate into slot 3."""
        address = self.arena.address
        thing = create_context(self.vm, context_request(Kind.OBJECT, address))
        sub = create_context(self.vm, context_request(Kind.SUB, address, vcpu_id=vcpu_id))
        request = context_request(Kind.GATE, address, vcpu_id=vcpu_id, target=sub)
        gate = create_context(self.vm, request)
        assert set_slot(vcpu, 2, thing) == 0
        assert set_slot(vcpu, 3, gate) == 0
        self.contexts += [thing, sub, gate]

    def judge(self, name: str, result: int) -> int:
        self.outcomes[f"{name}: {os.strerror(-result) if result < 0 else 'done'}"] += 1
        if result < 0 and -result not in ALLOWED[name]:
            self.failures.append(f"{name} returned {result} ({os.strerror(-result)})")
        return result

    # ---- actions of a thread ---------------------------------------------------------------------

    def create(self, choice: random.Random) -> None:
        kind = choice.choice(list(Kind))
        targets = [*self.contexts, 9999]
        request = context_request(
            kind,
            self.arena.address,
            vcpu_id=choice.randrange(2),
            target=choice.choice(targets[-3:]),
        )
        if choice.random() < 0.5:
            request = with_part(request, choice.choice([*self.memories, *self.contexts, 9999]))
        fd = self.judge("create", create_context(self.vm, request))
        if fd >= 0:
            self.contexts.append(fd)

    def register(self, choice: random.Random) -> None:
        size = choice.choice([1, ARENA_PAGES]) * PAGE
        fd = self.judge("register", register(self.kvm, self.arena.address, size))
        if fd >= 0:
            self.memories.append(fd)

    def close_memory(self, choice: random.Random) -> None:
        try:
            fd = self.memories.pop(choice.randrange(max(len(self.memories), 1)))
        except IndexError:
            return
        os.close(fd)

    def fill(self, choice: random.Random) -> None:
        vcpu, slot = choice.choice(self.vcpus), choice.choice(SLOTS)
        fd = choice.choice([*self.contexts, -1])
        self.judge("set slot", set_slot(vcpu, slot, fd))

    def fill_one(self, choice: random.Random) -> None:
        """Set the one slot that all threads compete for."""
        self.judge("set slot", set_slot(self.vcpus[0], 2, choice.choice([*self.contexts, -1])))

    def revoke(self, choice: random.Random) -> None:
        self.judge("revoke", revoke(self.vm, choice.randrange(2), choice.choice([0, *SLOTS])))

    def run(self, choice: random.Random) -> None:
        number = choice.randrange(2)
        vcpu = self.vcpus[number]
        slot = choice.choice([None, *SLOTS])
        self.judge("registers", set_registers(vcpu, slot=slot, loop=choice.random() < 0.5))
        if self.judge("run", raw(vcpu, "KVM_RUN")) >= 0:
            # The exit is of this run, or of an earlier one if another thread already runs the vCPU.
            (reason,) = struct.unpack_from("<I", self.areas[number], 8)
            (cause,) = struct.unpack_from("<I", self.areas[number], 32)
            self.outcomes[f"exit {reason}" + f" cause {cause}" * (reason == 0x45)] += 1
            if reason not in EXITS:
                self.failures.append(f"exit {reason}")

    def enable(self, choice: random.Random) -> None:
        flags = choice.choice([uapi.lib.KVM_ELISA_CONTEXTS, uapi.lib.KVM_ELISA_USER_HYPERCALLS])
        self.judge("enable", enable(self.vm, flags, choice.randrange(3)))

    def close_context(self, choice: random.Random) -> None:
        if self.contexts:
            try:
                fd = self.contexts.pop(choice.randrange(len(self.contexts)))
            except IndexError:
                return
            os.close(fd)

    def close_machine(self, choice: random.Random) -> None:
        """Close, rarely, the VM or a vCPU while other threads use it."""
        if choice.random() < 0.1:
            try:
                fd = self.owned.pop(choice.randrange(3))
            except IndexError:
                return
            os.close(fd)

    def change_memory(self, choice: random.Random) -> None:
        self.judge(
            "memory", set_memory(self.vm, self.arena.address, choice.choice([0, 4, 4, 4, 4, 4]))
        )

    # ---- the threads -----------------------------------------------------------------------------

    def _act(self, number: int) -> None:
        choice = random.Random(self.seed * 100 + number)
        # All threads do everything; the first one alone also remaps the memory itself.
        things: list[Callable[[random.Random], None]] = [
            *(self.create, self.create, self.fill, self.fill_one, self.revoke, self.revoke),
            *(self.register, self.register, self.close_memory),
            *(self.run, self.run, self.run, self.run, self.enable),
            *(self.close_context, self.close_machine, self.change_memory),
        ]
        for _ in range(ACTIONS):
            try:
                choice.choice(things)(choice)
                if number == 0 and choice.random() < 0.3:
                    choice.choice([self.arena.take_away, self.arena.protect])()
                    self.arena.put_back()
            except Exception as error:
                self.failures.append(repr(error))

    def race(self) -> None:
        child = 0
        if self.seed % 4 == 0:
            # The child drops its references, perhaps the last ones, at some moment.
            child = os.fork()
            if not child:
                time.sleep(0.01)
                os._exit(0)
        threads = [threading.Thread(target=self._act, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        self._kick(threads)
        if child:
            assert os.waitpid(child, 0)[1] == 0

    def _kick(self, threads: list[threading.Thread]) -> None:
        """Interrupt KVM_RUN in all threads, because other threads wait for it."""
        libc = ctypes.CDLL(None)
        deadline = time.monotonic() + 120
        while any(thread.is_alive() for thread in threads):
            assert time.monotonic() < deadline, "a thread hangs"
            for thread in threads:
                if thread.native_id:
                    libc.syscall(234, os.getpid(), thread.native_id, signal.SIGUSR1)  # tgkill
            time.sleep(0.002)
        for thread in threads:
            thread.join()

    def close(self) -> None:
        for fd in [*self.memories, *self.contexts, *self.owned]:
            os.close(fd)
        for area in self.areas:
            area.close()
        self.arena.close()


@pytest.mark.attack("T25")
@pytest.mark.usefixtures("_preemptible")
def test_racing_callers(kvm: Kvm) -> None:
    outcomes: Counter[str] = Counter()
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        crossings_work(kvm)
        for seed in range(ROUNDS):
            with quiet_kernel(), nothing_stays():
                racing = Round(kvm, seed, outcomes)
                try:
                    racing.race()
                finally:
                    racing.close()
                assert racing.failures == []
        crossings_work(kvm)
    finally:
        signal.signal(signal.SIGUSR1, old)
    print("\n".join(f"{name}: {count}" for name, count in sorted(outcomes.items())))
    # The calls must have achieved something.
    for name in ("create", "register", "set slot", "revoke", "run"):
        assert outcomes[f"{name}: done"] > 5, outcomes
    assert outcomes["run: Interrupted system call"], outcomes
