"""Each target's stored inputs break nothing, and reach what there is to reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.fuzz.configuration import harness as configuration
from tests.rigs.fuzz.control import harness as control
from tests.rigs.fuzz.device_state import harness as device_state
from tests.rigs.fuzz.inputs import read_corpus
from tests.rigs.fuzz.kernel_files import harness as kernel_files
from tests.rigs.fuzz.pci import harness as pci
from tests.rigs.fuzz.targets import TARGETS
from tests.rigs.fuzz.vhost_user import harness as vhost_user
from tests.rigs.fuzz.virtio_pci import harness as virtio_pci

pytestmark = pytest.mark.unit

BRANCHES = {
    "serial": 75,  # the rest waits for a reader of its output
    "kernel-files": 85,  # the rest runs programs, or starts a processor
    "pci": 80,  # the rest refuses states that are not its own
    "virtio-pci": 85,  # the rest refuses states that are not its own
    "device-state": 65,  # the rest is reached by accesses
    "configuration": 85,
    "control": 55,  # the rest is its listening thread
    "vhost-user": 70,  # the rest makes connections, and is the watching thread
}
"""Branches that the stored inputs reach at least, in percent; the switch has a test of its own."""


@pytest.mark.parametrize("name", BRANCHES)
def test_stored_inputs(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if missing := target.missing():
        pytest.skip(missing)
    inputs = target.inputs()
    outcome = target.fuzzer(tmp_path).run(0, inputs=inputs)
    assert outcome.finding == "", outcome.output
    assert outcome.executions >= len(inputs)
    reached = target.coverage(tmp_path, inputs)
    print(f"{name}: {reached}")
    assert reached.branches >= BRANCHES[name]


HARNESSES = {
    "configuration": configuration.try_input,
    "control": control.try_input,
    "device-state": device_state.try_input,
    "kernel-files": kernel_files.try_input,
    "pci": pci.try_input,
    "vhost-user": vhost_user.try_input,
    "virtio-pci": virtio_pci.try_input,
}


@pytest.mark.parametrize("name", HARNESSES)
def test_stored_inputs_without_a_fuzzer(name: str) -> None:
    """On any Python, and where coverage is measured."""
    for data in TARGETS[name].inputs():
        HARNESSES[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_stored(name: str) -> None:
    target = TARGETS[name]
    assert read_corpus(target.corpus)
    assert target.findings.exists()
