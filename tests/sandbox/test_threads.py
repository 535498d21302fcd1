"""Threads that are there before a process enters a sandbox are confined as well."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.devices.virtio.entropy import Entropy
from pykvm.sandbox import Confinement, SandboxError, enter
from pykvm.sandbox._sandbox import lib
from tests.rigs.confined import in_child
from tests.rigs.virtio_driver import RING_FEATURES, VirtioDriver

pytestmark = pytest.mark.unit

STATUS = {
    "CapInh": "0000000000000000",
    "CapPrm": "0000000000000000",
    "CapEff": "0000000000000000",
    "CapAmb": "0000000000000000",
    "NoNewPrivs": "1",
    "Seccomp": "2",
}


def status() -> dict[str, str]:
    """Return what the kernel says of this thread."""
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def refused(path: str) -> bool:
    try:
        Path(path).read_bytes()
    except PermissionError:
        return True
    return False


class Waiter(threading.Thread):
    """A thread in a system call, which looks at itself when it is told to."""

    def __init__(self, wait: Callable[[int], object]) -> None:
        super().__init__()
        self._read, self._write = os.pipe()
        self._wait = wait
        self.confined = False
        self.start()

    def run(self) -> None:
        self._wait(self._read)
        found = status()
        self.confined = all(found[name] == text for name, text in STATUS.items())
        self.confined = self.confined and refused("/etc/passwd")

    def look(self) -> bool:
        os.write(self._write, b"x")
        self.join(20)
        return self.confined


def test_threads_that_wait_and_work() -> None:
    """Their waiting goes on afterwards; capabilities of the bounding set are gone too, for root."""

    def body() -> list[bool]:
        stop = threading.Event()
        worker = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, 1)])
        worker.start()
        waiters = [Waiter(lambda fd: os.read(fd, 1)) for _ in range(20)]
        applied = enter(Confinement())
        found = [waiter.look() for waiter in waiters]
        stop.set()
        worker.join()
        assert applied.threads == 22
        assert applied.complete
        if os.getuid() == 0:
            assert status()["CapBnd"] == "0000000000000000"
        return found

    assert in_child(body) == [True] * 20


def test_threads_that_start_meanwhile() -> None:
    """Each by the one before, so that some have all the rulesets that Linux takes of a thread."""

    def body() -> list[bool]:
        found: list[bool] = []
        end = threading.Event()

        def chain(left: int) -> None:
            if left:
                threading.Thread(target=chain, args=(left - 1,)).start()
            else:
                end.wait()
                found.append(refused("/etc/passwd") and status()["NoNewPrivs"] == "1")

        for _ in range(4):
            chain(500)
        enter(Confinement())
        end.set()
        while threading.active_count() > 1:
            time.sleep(0.01)
        return found

    assert in_child(body) == [True] * 4


def submit(times: int) -> None:
    """Let this thread submit to rules that forbid nothing much, as often as it is said."""
    ruleset = lib.sandbox_landlock_ruleset(lib.LANDLOCK_ACCESS_FS_MAKE_SYM, 0, 0, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    for _ in range(times):
        assert libc.syscall(446, ruleset, 0) == 0, os.strerror(ctypes.get_errno())
    os.close(ruleset)


@pytest.mark.parametrize("where", ["in a thread", "in all"])
def test_no_room_for_more_rules(where: str) -> None:
    """Linux takes 16 rulesets of a thread: who has them already cannot be confined."""

    def body() -> str:
        ready, end = threading.Event(), threading.Event()

        def full() -> None:
            submit(16)
            ready.set()
            end.wait()

        if where == "in all":
            submit(16)
            ready.set()
        else:
            threading.Thread(target=full).start()
        ready.wait()
        try:
            enter(Confinement())
        except SandboxError as error:
            return error.problem
        finally:
            end.set()
        return ""

    assert "cannot restrict its files (argument list too long)" in in_child(body)


def test_a_device_that_runs_already() -> None:
    """As those of a restored machine: their threads leave one signal to the sandbox."""

    def body() -> list[str]:
        with VirtioDriver([8], RING_FEATURES[0]) as driver:
            device = Entropy(driver.memory)
            driver.start(device)
            threads = enter(Confinement()).threads
            for task in Path("/proc/self/task").iterdir():
                text = (task / "status").read_text()
                assert "NoNewPrivs:\t1\n" in text, text
                assert "CapPrm:\t0000000000000000\n" in text, text
            answers = [driver.request(0, writable=[100])]
            driver.stop(device)
            driver.start(device)
            answers.append(driver.request(0, writable=[100]))
            device.close()
        return [str(threads), *(str(answer.written) for answer in answers)]

    found = in_child(body)
    assert found == ["3", "100", "100"], "this thread, the device's, and the one that it reports to"


def test_a_thread_that_blocks_all_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykvm.sandbox.process._PATIENCE", 200)

    def body() -> str:
        ready = threading.Event()
        reader, writer = os.pipe()

        def deaf() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            # The kernel's name; the C library blocks no more than Python does.
            ctypes.CDLL(None).prctl(15, b"deaf", 0, 0, 0)
            ready.set()
            os.read(reader, 1)
            # What was pending does no harm.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())

        thread = threading.Thread(target=deaf)
        thread.start()
        ready.wait()
        try:
            enter(Confinement())
        except SandboxError as error:
            os.write(writer, b"x")
            thread.join()
            return str(error)
        return ""

    assert in_child(body) == (
        "thread deaf does not answer (connection timed out): "
        "start it after entering the sandbox: it blocks all signals"
    )


def test_a_thread_with_a_filter_of_its_own() -> None:
    def body() -> str:
        reader, writer = os.pipe()
        ready = threading.Event()

        def strict() -> None:
            libc = ctypes.CDLL(None)
            assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
            allow = (ctypes.c_uint64 * 1)(0x7FFF000000000006)  # return SECCOMP_RET_ALLOW
            program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(allow))
            assert libc.prctl(22, 2, program) == 0  # PR_SET_SECCOMP
            ready.set()
            os.read(reader, 1)

        thread = threading.Thread(target=strict)
        thread.start()
        ready.wait()
        try:
            enter(Confinement())
        except SandboxError as error:
            os.write(writer, b"x")
            thread.join()
            return str(error)
        return ""

    assert in_child(body) == (
        "a thread has a filter of system calls of its own: enter the sandbox before it"
    )
