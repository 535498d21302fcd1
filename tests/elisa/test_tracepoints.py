"""The patch's tracepoints, read from the kernel's trace buffer."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pykvm.elisa import crossing
from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import Protection
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.context_requests import Machine, good, revoke, set_slot
from tests.rigs.probe import WILD, Probe, Wild, calls, give, prepare, run
from tests.rigs.tracefs import TRACING, mount_tracefs

pytestmark = pytest.mark.elisa

EVENTS = ("kvm_elisa_attach", "kvm_elisa_detach", "kvm_elisa_violation", "kvm_elisa_revoke")


@pytest.fixture(scope="module", autouse=True)
def _tracefs() -> None:
    mount_tracefs()


@contextmanager
def traced() -> Iterator[list[str]]:
    """Yield a list that holds a line "name: fields" for each event after the end of the context."""
    lines: list[str] = []
    switches = [TRACING / "events" / "kvm" / name / "enable" for name in EVENTS]
    (TRACING / "trace").write_text("")
    for switch in switches:
        switch.write_text("1")
    try:
        yield lines
    finally:
        for switch in switches:
            switch.write_text("0")
        found = re.findall(r"(kvm_elisa_\w+: .*)", (TRACING / "trace").read_text())
        lines.extend(found)


def test_they_exist() -> None:
    for name in EVENTS:
        text = (TRACING / "events" / "kvm" / name / "format").read_text()
        assert f"name: {name}\n" in text


def test_attach_detach_revoke(machine: Machine) -> None:
    with traced() as lines:
        fd = good(machine).send(machine.vm)
        for slot in (2, 511):
            assert set_slot(machine.vcpu, slot, fd) == 0
        assert set_slot(machine.vcpu, 511, -1) == 0
        assert revoke(machine.vm, 0, 2) == 0
        os.close(fd)
    names = [line.split(":")[0] for line in lines]
    assert names[:3] == ["kvm_elisa_attach", "kvm_elisa_attach", "kvm_elisa_detach"]
    assert "kvm_elisa_revoke" in names[3:]
    for line, slot in zip(lines, (2, 511, 511, 2), strict=False):
        assert re.search(rf"\bslot {slot}\b", line), line
        assert re.search(r"\bvcpu 0\b", line), line


def test_violation(kvm: Kvm) -> None:
    with (
        SharedObject("wild", WILD, without={Protection.CODE_CHECK}).open() as wild,
        BareGuest(kvm, Probe()) as guest,
        traced() as lines,
    ):
        prepare(guest)
        slot = wild.attach(guest).slot
        give(guest, calls(slot, Wild.WRITE, crossing.CROSSING_GVA + crossing.IMAGE_OFFSET, 1))
        assert len(run(guest)) == 1
    (line,) = [line for line in lines if line.startswith("kvm_elisa_violation")]
    assert re.search(rf"\bslot {slot}\b", line), line
    gpa = crossing.SUB_PRIVATE_GPA + crossing.IMAGE_OFFSET
    assert f"{gpa:x}" in line


def test_nothing_of_refused_calls(machine: Machine) -> None:
    with traced() as lines:
        assert set_slot(machine.vcpu, 2, machine.vm.fileno()) < 0
        assert revoke(machine.vm, 0, 2) < 0
    assert lines == []
