"""Each target's stored inputs break nothing, and reach what there is to reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.fuzz.inputs import read_corpus
from tests.rigs.fuzz.targets import TARGETS

pytestmark = pytest.mark.unit

BRANCHES = {
    "serial": 75,  # the rest waits for a reader of its output
    "kernel-files": 85,  # the rest runs programs, or starts a processor
    "pci": 80,  # the rest refuses states that are not its own
    "virtio-pci": 85,  # the rest refuses states that are not its own
    "device-state": 65,  # the rest is reached by accesses
    "configuration": 85,
    "control": 60,  # the rest is its listening thread
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


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_stored(name: str) -> None:
    target = TARGETS[name]
    assert read_corpus(target.corpus)
    assert target.findings.exists()
