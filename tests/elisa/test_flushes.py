"""Flushes of translations, counted by a probe on the function that runs INVEPT.

A processor tags translations with the page of an EPT's root. KVM frees its own roots without a
flush and flushes when it loads one. VMFUNC loads a context's root without KVM. The emulated
processor keeps too few translations to show the harm itself.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rigs.context_requests import (
    EPTP,
    Machine,
    R,
    Request,
    chain,
    close,
    good,
    leaf,
    set_slot,
)
from tests.rigs.tracefs import kprobes

pytestmark = pytest.mark.elisa


def cpus() -> int:
    return len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))


def flushes(body: Callable[[], object]) -> int:
    """Return the number of flushes during `body`, over all CPUs."""
    with kprobes("p:pykvm/flush kvm_intel:elisa_invept") as lines:
        body()
    return sum("flush: " in line for line in lines)


@pytest.mark.attack("T22")
def test_a_context_is_flushed_before_its_first_use_and_after_its_last(machine: Machine) -> None:
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
    assert flushes(lambda: close(*fds)) == 0
    assert flushes(lambda: set_slot(machine.vcpu, 2, -1)) == 2 * cpus()


def test_what_was_refused_needs_no_flush(machine: Machine) -> None:
    assert flushes(lambda: good(machine, leaf(9)).send(machine.vm)) == 0
