"""T20: a VMM that dies after any step of an attachment's life, or in the middle of one.

Other processes hold its files by fork, by exec, and by a message. Pages stay pinned as long as any
process can use them.
"""

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pykvm.elisa import calls
from pykvm.kvm import Kvm
from tests.rigs.context_requests import (
    EPTP,
    LIST,
    Machine,
    Memory,
    R,
    Request,
    chain,
    good,
    leaf,
    revoke,
    set_slot,
)
from tests.rigs.host_state import host_state, nothing_stays, pinned_pages

pytestmark = pytest.mark.elisa

PINNED = 3  # pages that `good` pins


def steps(kvm: Kvm, address: int) -> Iterator[str]:
    """Perform the steps of an attachment's life, yielding the name of each one after it."""
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        yield "a vm"
        vcpu = vm.create_vcpu(0)
        yield "a vcpu"
        sub = good(Machine(vm, vcpu, address)).send(vm)
        assert sub > 0
        yield "a sub context"
        pages = [(0, EPTP, sub), (0, LIST, 0)]
        gate = Request(chain(leaf(0, R), leaf(1)), pages).send(vm)
        assert gate > 0
        yield "a gate context"
        assert set_slot(vcpu, 2, gate) == 0
        yield "a slot"
        os.close(sub)
        os.close(gate)
        yield "no files"
        assert revoke(vm, 0, 2) == 0
        yield "revoked"
        again = good(Machine(vm, vcpu, address)).send(vm)
        assert set_slot(vcpu, 2, again) == 0
        yield "attached again"
        assert set_slot(vcpu, 2, -1) == 0
        os.close(again)
        yield "detached"


STEPS = [
    "a vm",
    "a vcpu",
    "a sub context",
    "a gate context",
    "a slot",
    "no files",
    "revoked",
    "attached again",
    "detached",
]
HOLDS = {*STEPS[2:6], "attached again"}
"""Steps after which pages are pinned."""


@contextmanager
def child(body: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """Run body(pipe) in a child process that then waits.

    Yields the child's PID and the other end of the pipe. The child is killed at the end.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            body(writer)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        yield pid, reader
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def told(reader: int) -> str:
    """Return the next message of a child; fail if the child has ended."""
    text = os.read(reader, 64)
    assert text, "the child has ended"
    return text.decode()


@pytest.mark.attack("T20")
@pytest.mark.parametrize("last", STEPS)
def test_killed_behind_a_step(kvm: Kvm, last: str) -> None:
    def body(writer: int) -> None:
        with Memory(3) as address:
            for name in steps(kvm, address):
                if name == last:
                    os.write(writer, name.encode())
                    signal.pause()

    with nothing_stays() as before, child(body) as (_, reader):
        assert told(reader) == last
        assert pinned_pages() == before.pinned + (PINNED if last in HOLDS else 0)


@pytest.mark.attack("T20")
def test_killed_at_any_moment(kvm: Kvm) -> None:
    """The VMM is killed at random moments, also in the middle of calls."""

    def body(writer: int) -> None:
        with Memory(3) as address:
            while True:
                for name in steps(kvm, address):
                    os.write(writer, name[-1:].encode())

    chance = random.Random(20)
    with nothing_stays():
        for _ in range(25):
            with child(body) as (_, reader):
                for _ in range(chance.randrange(1, 20)):
                    told(reader)
                time.sleep(chance.uniform(0, 0.003))


def context_of_a_vm(kvm: Kvm, address: int) -> int:
    """Return the descriptor of a context; no other file of its VM is open."""
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        return good(Machine(vm, vm.create_vcpu(0), address)).send(vm)


@pytest.mark.attack("T20")
@pytest.mark.parametrize("kept", [False, True], ids=["as it is", "made inheritable"])
def test_exec(kvm: Kvm, kept: bool) -> None:
    """The memory is gone with the old program.

    A context's file is closed with it, unless the VMM has cleared close-on-exec. Then its pages
    stay pinned until the new program ends.
    """

    def body(writer: int) -> None:
        with Memory(3) as address:
            fd = context_of_a_vm(kvm, address)
            os.set_inheritable(fd, kept)
            os.dup2(writer, 1)
            os.execvp("sh", ["sh", "-c", "echo new; exec sleep 1000"])

    with nothing_stays() as before, child(body) as (_, reader):
        assert told(reader) == "new\n"
        assert pinned_pages() == before.pinned + (PINNED if kept else 0)
        if not kept:
            assert host_state().module_users == before.module_users


@pytest.mark.attack("T20")
def test_a_context_passed_to_another_process(kvm: Kvm) -> None:
    """After the VMM's death the receiver of the file keeps pages and VM until it closes it."""
    ours, theirs = socket.socketpair()

    def body(writer: int) -> None:
        with Memory(3) as address:
            fd = context_of_a_vm(kvm, address)
            socket.send_fds(theirs, [b"!"], [fd])
            os.write(writer, b"sent")

    with ours, theirs, nothing_stays() as before:
        with child(body) as (_, reader):
            assert told(reader) == "sent"
        # Nobody has received it yet: the message holds it.
        assert pinned_pages() == before.pinned + PINNED
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        assert pinned_pages() == before.pinned + PINNED
        os.close(fd)
        assert pinned_pages() == before.pinned
