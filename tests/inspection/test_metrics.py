"""pykvm.inspection.metrics: tables, JSON, and Prometheus's text format."""

import json
import math
import re
from collections.abc import Iterator

import pytest

from pykvm.inspection.exposition import Family, render
from pykvm.inspection.metrics import Metrics, exit_counts, exit_table
from pykvm.kvm import Kvm
from tests.rigs.inspected.machine import InspectedMachine
from tests.rigs.needs import need
from tests.rigs.waiting import wait_for

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (?P<value>\S+)")


def parse(text: str) -> dict[str, dict[str, dict[frozenset[tuple[str, str]], float]]]:
    """Return families by name, with "type" as kind, checking all rules of the format."""
    assert text.endswith("\n")
    families: dict[str, dict[str, dict[frozenset[tuple[str, str]], float]]] = {}
    kinds: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        if found := re.fullmatch(rf"# HELP ({NAME}) .+", line):
            current = found[1]
            assert current not in families, "a family in two places"
            families[current] = {}
        elif found := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge|histogram)", line):
            assert found[1] == current
            kinds[current] = found[2]
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            name = sample[1]
            ends = ("_bucket", "_count") if kinds[current] == "histogram" else ("",)
            assert name in {current + end for end in ends}
            assert kinds[current] != "counter" or name.endswith("_total")
            labels = frozenset(re.findall(LABEL, sample[2] or ""))
            samples = families[current].setdefault(name, {})
            assert labels not in samples, "a sample twice"
            samples[labels] = float(sample["value"])
    assert kinds.keys() == families.keys()
    return families


@pytest.fixture
def printing(kvm: Kvm) -> Iterator[tuple[InspectedMachine, Metrics]]:
    with (
        InspectedMachine(kvm, entry="printing", cpus=2) as machine,
        Metrics(machine.vm, machine.vcpus, {"machine": "one"}) as metrics,
    ):
        machine.start()
        wait_for(lambda: all(exit_counts(vcpu) for vcpu in machine.vcpus))
        yield machine, metrics


@pytest.mark.kvm
@pytest.mark.native
def test_a_table(printing: tuple[InspectedMachine, Metrics]) -> None:
    machine, _ = printing
    head, first, *_ = exit_table(machine.vcpus).splitlines()
    assert head.split() == ["exits", "served", "by", "vcpu", "0", "vcpu", "1", "all"]
    reason, by, zero, one, both = first.split()
    assert (reason, by) == ("io", "python")
    assert int(zero) + int(one) == int(both) > 0


@pytest.mark.kvm
@pytest.mark.native
def test_json(printing: tuple[InspectedMachine, Metrics]) -> None:
    machine, metrics = printing
    need(machine.vm, "KVM_CAP_BINARY_STATS_FD")
    text = metrics.json()
    assert "\n" not in text
    first, second = json.loads(text)["vcpus"]
    assert (first["id"], second["id"]) == (0, 1)
    assert first["exits"]["io"]["python"] > 0
    assert first["exits"]["io"]["native"] == 0
    assert first["runs"] >= first["exits"]["io"]["python"]
    assert first["kvm"]["exits"] > 0
    assert "remote_tlb_flush" in json.loads(text)["kvm"]


@pytest.mark.kvm
@pytest.mark.native
def test_the_text_format(printing: tuple[InspectedMachine, Metrics]) -> None:
    machine, metrics = printing
    need(machine.vm, "KVM_CAP_BINARY_STATS_FD")
    families = parse(metrics.prometheus())
    exits = families["pykvm_vcpu_exits_total"]["pykvm_vcpu_exits_total"]
    key = {"machine": "one", "vcpu": "1", "reason": "io", "served_by": "python"}
    assert exits[frozenset(key.items())] > 0
    assert len(families["pykvm_vcpu_runs_total"]["pykvm_vcpu_runs_total"]) == 2
    assert "pykvm_kvm_vcpu_exits_total" in families
    assert "pykvm_kvm_vm_remote_tlb_flush_total" in families
    waits = families["pykvm_kvm_vcpu_halt_wait_hist_seconds"]
    for vcpu in ("0", "1"):
        buckets = {
            float(dict(labels)["le"]): value
            for labels, value in waits["pykvm_kvm_vcpu_halt_wait_hist_seconds_bucket"].items()
            if dict(labels)["vcpu"] == vcpu
        }
        assert list(buckets) == sorted(buckets)
        assert list(buckets.values()) == sorted(buckets.values())
        assert math.inf in buckets


@pytest.mark.kvm
@pytest.mark.native
def test_metrics_are_read_while_the_guest_runs(
    printing: tuple[InspectedMachine, Metrics],
) -> None:
    machine, metrics = printing
    before = metrics.read()["vcpus"][0]["runs"]
    wait_for(lambda: metrics.read()["vcpus"][0]["runs"] > before)
    assert machine.vcpus


@pytest.mark.unit
def test_families() -> None:
    gauge = Family("some-thing", "gauge", "A thing\nwith \\ lines.")
    gauge.add({}, 1)
    gauge.add({"name": 'a "b"\n\\'}, 2.5e-09)
    histogram = Family("times", "histogram", "Times.")
    histogram.add_histogram({"cpu": "0"}, [0.0, 1e-9], [3, 0, 2])
    assert render([gauge, Family("none", "counter", "No samples."), histogram]) == (
        "# HELP some_thing A thing\\nwith \\\\ lines.\n"
        "# TYPE some_thing gauge\n"
        "some_thing 1\n"
        'some_thing{name="a \\"b\\"\\n\\\\"} 2.5e-09\n'
        "# HELP times Times.\n"
        "# TYPE times histogram\n"
        'times_bucket{cpu="0",le="0.0"} 3\n'
        'times_bucket{cpu="0",le="1e-09"} 3\n'
        'times_bucket{cpu="0",le="+Inf"} 5\n'
        'times_count{cpu="0"} 5\n'
    )
    parse(render([gauge, histogram]))
