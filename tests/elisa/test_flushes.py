"""When translations are flushed: counted by a probe on the function that runs INVEPT.

A processor tells translations apart by the page of an EPT's root. KVM frees its own roots without
a flush and flushes when it loads one; VMFUNC loads a context's without KVM. The emulated processor
keeps too few translations to show the harm itself.
"""

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.elisa.context_requests import EPTP, Machine, R, Request, chain, good, leaf, set_slot

pytestmark = pytest.mark.elisa

TRACING = Path("/sys/kernel/tracing")
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
PROBE = "pykvm/flush"

Count = Callable[[Callable[[], object]], int]


def cpus() -> int:
    return len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))


def _command(line: str) -> None:
    file = os.open(TRACING / "kprobe_events", os.O_WRONLY)  # truncating it removes all probes
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@pytest.fixture
def flushes() -> Iterator[Count]:
    """Counts the CPUs that flushed while a function ran."""
    if not (TRACING / "kprobe_events").exists():
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mount(
            b"tracefs", os.fsencode(TRACING), b"tracefs", ctypes.c_ulong(MS_NOSUID_NODEV_NOEXEC), 0
        )
        if not (TRACING / "kprobe_events").exists():
            pytest.skip("this kernel has no kprobe events")
    _command(f"p:{PROBE} kvm_intel:elisa_invept")
    switch = TRACING / "events" / PROBE / "enable"

    def count(body: Callable[[], object]) -> int:
        (TRACING / "trace").write_text("")
        switch.write_text("1")
        try:
            body()
        finally:
            switch.write_text("0")
        return len(re.findall(r"\bflush: ", (TRACING / "trace").read_text()))

    try:
        yield count
    finally:
        _command(f"-:{PROBE}")


def test_a_context_is_flushed_before_its_first_use_and_after_its_last(
    machine: Machine, flushes: Count
) -> None:
    fds: list[int] = []

    def create(request: Request) -> None:
        fds.append(request.send(machine.vm))
        assert fds[-1] > 0

    assert flushes(lambda: create(good(machine))) == cpus()
    sub = fds[0]
    gate = Request(chain(leaf(0, R)), [(0, EPTP, sub)])
    assert flushes(lambda: create(gate)) == cpus()
    assert flushes(lambda: set_slot(machine.vcpu, 2, fds[1])) == 0
    # The list keeps the gate, and the gate its sub context.
    assert flushes(lambda: [os.close(fd) for fd in fds]) == 0
    assert flushes(lambda: set_slot(machine.vcpu, 2, -1)) == 2 * cpus()


def test_what_was_refused_needs_no_flush(machine: Machine, flushes: Count) -> None:
    assert flushes(lambda: good(machine, leaf(9)).send(machine.vm)) == 0
