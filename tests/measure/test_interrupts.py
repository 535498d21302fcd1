"""Latencies of interrupts: the arithmetic, and a small real measurement."""

import json

import pytest

from pykvm.elisa import crossing
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.measure.exit_counter import Exits
from pykvm.measure.interrupts import LateTimerError, _point, measure_interrupts
from pykvm.measure.programs import InterruptProgram, InterruptSample, interrupt_samples

RETURN_PAGE = crossing.CROSSING_GVA + crossing.RETURN_OFFSET
NO_EXITS = Exits({"exits": 0, "irq_exits": 0}, 0)


@pytest.mark.unit
def test_samples_of_parts() -> None:
    program = InterruptProgram(2, [5, 6], 100)
    words = b"".join(n.to_bytes(8, "little") for n in range(4 * 2 * 6))
    parts = interrupt_samples(words, program)
    assert [len(part) for part in parts] == [2] * 4
    assert parts[0][0] == InterruptSample(0, 1, 2, 3, 4)
    assert parts[3][1] == InterruptSample(42, 43, 44, 45, 46)
    assert program.input() == (5).to_bytes(8, "little") + (6).to_bytes(8, "little")


@pytest.mark.unit
def test_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first handler runs at the return, and the second before the end of the call.

    The third call began too late.
    """
    monkeypatch.setattr("pykvm.measure.interrupts.is_emulated", lambda: False)
    samples = [
        InterruptSample(1000, 900, 1500, 1700, RETURN_PAGE),
        InterruptSample(1000, 910, 1500, 1100, 0x10_0000),
        InterruptSample(1000, 1001, 1500, 9999, RETURN_PAGE),
    ]
    point = _point("object", 500, samples, NO_EXITS, 0.5)
    assert list(point.latency.values) == [700, 100]
    assert point.behind is not None
    assert list(point.behind.values) == [200]
    assert (point.at_return, point.late) == (1, 1)
    record = json.loads(json.dumps(point.as_dict()))
    assert (record["way"], record["left"], record["cost"]) == ("object", 500, 200)
    assert record["samples"] == [350, 50]
    assert record["behind"]["samples"] == [100]


@pytest.mark.unit
def test_all_too_late() -> None:
    with pytest.raises(LateTimerError, match="run it with less load"):
        _point("default", 0, [InterruptSample(5, 5, 6, 7, 0)], NO_EXITS, 1.0)


@pytest.mark.elisa
@pytest.mark.counted
def test_measured() -> None:
    """Both ways are measured.

    An event that waits for the return waits for the remaining work, and for little more than an
    interrupt in the default context takes.
    """
    count, left = 8, 20_000
    with Kvm() as kvm:
        default, inside = measure_interrupts(kvm, count, 1.0, [left])
    assert (default.way, inside.way) == ("default", "object")
    assert default.behind is None
    assert default.at_return == 0
    assert inside.at_return > count // 2
    assert inside.behind is not None
    assert inside.exits.counters["elisa_returns"] >= inside.at_return
    assert default.exits.counters["elisa_returns"] == 0
    if is_emulated():  # counts: a host's own interrupt can only add to one of them
        assert default.latency.cost < left
        assert left <= inside.latency.cost < left + 3 * default.latency.cost
