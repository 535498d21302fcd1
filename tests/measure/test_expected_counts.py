"""Exactly repeatable counts against the stored ones in benchmarks/expected.json.

A change that alters them on purpose updates that file too.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.measure.bursts import measure_bursts
from pykvm.measure.crossing_cost import Crossing, measure_crossing
from pykvm.measure.programs import SwitchPath, Way

pytestmark = [pytest.mark.elisa, pytest.mark.counted]

STORED = Path(__file__).parents[2] / "benchmarks" / "expected.json"
EXPECTED: dict[str, Any] = json.loads(STORED.read_text())
CALLS = 100

# The maximum that the design allows.
MOST_FOR_A_CROSSING = 48
MOST_FOR_A_PACKET = 90


@pytest.fixture(scope="module")
def crossing(kvm: Kvm) -> Crossing:
    return measure_crossing(kvm, CALLS, 1.0)


def gcc_version() -> str:
    """Return the major version of the compiler, which decides about instructions of the switch."""
    command = ["gcc", "-dumpversion"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.split(".")[0].strip()


def counted() -> None:
    if not is_emulated():
        pytest.skip("the time stamp counter counts instructions on the emulated host only")


def test_exits_of_one_call(crossing: Crossing) -> None:
    """KVM counts no exit for VMFUNC and one for each VMCALL."""
    assert {name: way.vm_exits for name, way in crossing.ways.items()} == {
        "vmfunc": 0,
        "vmcall_kernel": 1,
        "vmcall_user": 1,
        "direct": 0,
    }
    hypercalls = {name: way.exits.counters["hypercalls"] for name, way in crossing.ways.items()}
    assert hypercalls == {"vmfunc": 0, "vmcall_kernel": CALLS, "vmcall_user": CALLS, "direct": 0}


def test_vmfuncs_of_one_call(crossing: Crossing) -> None:
    assert {name: way.vmfuncs for name, way in crossing.ways.items() if way.vmfuncs} == {
        "vmfunc": 3
    }


def test_samples(crossing: Crossing) -> None:
    """There is one sample for each call, nearly all alike, and the record holds them all."""
    for way in crossing.ways.values():
        assert len(way.samples.values) == CALLS
    record = crossing.as_dict()
    ways = {"vmfunc", "vmcall_kernel", "vmcall_user", "direct", "empty"}
    assert set(record) == ways | {"for_weak_processors"}
    for name in crossing.ways:
        assert {"vm_exits", "vmfuncs", "cost", "samples"} <= set(record[name])
        assert len(record[name]["samples"]) == CALLS
    json.dumps(record)
    counted()
    values = list(crossing.ways["vmfunc"].samples.values)
    assert values.count(min(values)) > CALLS * 0.9


def test_instructions_of_a_crossing(crossing: Crossing) -> None:
    counted()
    costs = {name: way.samples.cost for name, way in crossing.ways.items()}
    assert costs["vmfunc"] <= MOST_FOR_A_CROSSING
    for name, expected in EXPECTED["crossing"].items():
        assert costs[name] == expected, name
    # Leaving the guest costs over ten times as much; leaving the kernel costs yet more.
    assert costs["vmcall_user"] > costs["vmcall_kernel"] > 10 * costs["vmfunc"]


def test_only_the_ways_asked_for(kvm: Kvm) -> None:
    assert set(measure_crossing(kvm, 3, 1.0, [Way.DIRECT]).ways) == {"direct"}


@pytest.mark.parametrize("path", [SwitchPath.VMFUNC, SwitchPath.DIRECT])
def test_instructions_of_a_packet(kvm: Kvm, path: SwitchPath) -> None:
    """The count is the sender's, its call included, for a burst that is sent at once.

    With a compiler for which no count is stored, only the limit holds.
    """
    stored = EXPECTED["switch"]
    burst = stored["burst"]
    (point,) = measure_bursts(
        kvm, path, stored["guests"], 1.0, sizes=(stored["size"],), bursts=(burst,), repeats=16
    )
    assert point.exits.own == 0
    assert point.frames == 16 * burst
    counted()
    cost = point.as_dict()["cost_per_packet"]
    assert cost <= MOST_FOR_A_PACKET
    if by_path := stored["cost_per_packet"].get(gcc_version()):
        assert cost == by_path[path.name.lower()]
