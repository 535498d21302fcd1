"""Interrupted calls are repeated after Python's signal handlers have run (PEP 475)."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pykvm.kvm import Kvm, lib
from pykvm.kvm.handle import Handle
from pykvm.kvm.ioctls import IOCTLS, Scope


@contextmanager
def ticking(handler: Callable[[int, object], None], interval: float) -> Iterator[None]:
    """Run a timer whose signal interrupts system calls, as a profiler's does."""
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _long_enough(kvm: Kvm) -> float:
    """Return an interval in seconds within which a VM can be made.

    A call that is interrupted each time never ends, and the emulated host takes long for one.
    """
    start = time.monotonic()
    with kvm.create_vm() as vm, vm.create_vcpu(0):
        return max(0.0005, 2 * (time.monotonic() - start))


@pytest.mark.kvm
def test_vms_are_made_under_a_profiling_timer(kvm: Kvm) -> None:
    """KVM_CREATE_VM starts threads and waits for them, so signals interrupt it now and then."""
    ticks = 0
    interval = _long_enough(kvm)

    def tick(_number: int, _frame: object) -> None:
        nonlocal ticks
        ticks += 1

    with ticking(tick, interval):
        while ticks < 50:
            with kvm.create_vm() as vm, vm.create_vcpu(0):
                pass


class Interrupted(Handle):
    """A handle for which the test chooses the kernel's answers; all else is real."""

    scope = Scope.SYSTEM


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Yield a list for the answers of the next calls, in order.

    An answer is a number, or a function to call before EINTR.
    """
    waiting: list[Any] = []

    class Answering:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def pykvm_ioctl(self, _fd: int, _number: int, _word: int) -> int:
            answer = waiting.pop(0)
            if callable(answer):
                answer()
                return -errno.EINTR
            return int(answer)

    monkeypatch.setattr("pykvm.kvm.handle.lib", Answering())
    yield waiting
    assert waiting == []


@pytest.mark.unit
def test_every_interruption_is_followed_by_another_call(answers: list[Any]) -> None:
    with Interrupted(os.open("/dev/null", os.O_RDONLY)) as handle:
        answers[:] = [-errno.EINTR, -errno.EINTR, -errno.EINTR, 7]
        assert handle.ioctl("KVM_CREATE_VM") == 7


@pytest.mark.unit
def test_what_a_signal_handler_raises_ends_the_call(answers: list[Any]) -> None:
    """Ctrl-C is the usual case; the call is not repeated."""

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupted(os.open("/dev/null", os.O_RDONLY)) as handle:
            answers[:] = [press]
            with pytest.raises(KeyboardInterrupt):
                handle.ioctl("KVM_CREATE_VM")
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.unit
def test_a_handle_that_a_signal_handler_closes(answers: list[Any]) -> None:
    with Interrupted(os.open("/dev/null", os.O_RDONLY)) as handle:
        answers[:] = [handle.close]
        with pytest.raises(Exception, match="is closed: create another one"):
            handle.ioctl("KVM_CREATE_VM")


@pytest.mark.unit
@pytest.mark.parametrize("scope", Scope)
def test_every_call_goes_this_way(scope: Scope, answers: list[Any]) -> None:
    """KVM_RUN is excepted: its EINTR means that the guest shall stop. The run loop calls it."""
    kind = type("Interrupted", (Handle,), {"scope": scope})
    for entry in IOCTLS.values():
        if scope in entry.scopes and entry.name != "KVM_RUN":
            with kind(os.open("/dev/null", os.O_RDONLY)) as handle:
                answers[:] = [-errno.EINTR, 3]
                assert handle._raw_ioctl(entry) == 3


@pytest.mark.kvm
def test_a_thread_without_signal_handlers_goes_on_too(kvm: Kvm) -> None:
    """Python's handlers run only in the main thread, but the others are interrupted as well."""
    made: list[int] = []
    failures: list[BaseException] = []
    interval = _long_enough(kvm)

    def make() -> None:
        try:
            for _ in range(50):
                with kvm.create_vm():
                    made.append(1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        thread.start()
        while thread.is_alive():
            signal.pthread_kill(thread.ident or 0, signal.SIGUSR1)
            time.sleep(interval)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert failures == []
    assert len(made) == 50
