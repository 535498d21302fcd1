"""Meaning of a guest's samples of its calls: phases, bursts and groups."""

import pytest

from pykvm.measure.bursts import BurstStuckError, _points, phases_of
from pykvm.measure.exchange import Exchange
from pykvm.measure.exit_counter import Exits
from pykvm.measure.programs import SendSample, SwitchPath

pytestmark = pytest.mark.unit


def exits(total: int, interrupts: int = 0) -> Exits:
    return Exits({"exits": total, "irq_exits": interrupts}, marks=1)


def sample(cycles: int, sent: int, wanted: int | None = None) -> SendSample:
    return SendSample(cycles, wanted or sent, sent)


@pytest.fixture(autouse=True, params=["emulated", "hardware"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setenv("PYKVM_TESTBED", "1" if name == "emulated" else "")
    return name


def test_phases() -> None:
    """Sizes and bursts come in order, after one warm-up."""
    phases = phases_of((64, 1514), (1, 32), 4)
    assert [(p.frame_bytes, p.burst, p.bursts) for p in phases[1:]] == [
        (64, 1, 4),
        (64, 32, 4),
        (1514, 1, 4),
        (1514, 32, 4),
    ]
    assert phases[2].frames == 128


def test_samples_belong_to_phases_by_their_frames(host: str) -> None:
    """A burst that had to wait is split over several calls.

    It counts in no figure, and moves no other sample into the wrong phase.
    """
    phases = phases_of((64,), (4, 2), 3)
    calls = [sample(9, 1)] * 8  # the warm-up
    calls += [sample(100, 4), sample(30, 1, 4), sample(70, 3), sample(104, 4)]
    calls += [sample(50, 2), sample(54, 2), sample(58, 2)]
    counted = {0: exits(1), 1: exits(4, 2), 2: exits(1)}
    points = _points(SwitchPath.VMFUNC, 2, 1.0, phases, calls, counted)
    assert [list(point.samples.values) for point in points] == [[100, 104], [50, 54, 58]]
    assert [point.burst for point in points] == [4, 2]
    record = points[0].as_dict()
    assert record["cost_per_packet"] == (100 if host == "emulated" else 102) / 4
    assert record["vm_exits_per_packet"] == 1 / 12  # 4, less 2 interrupts, less the mark
    assert record["path"] == "vmfunc"


def test_no_whole_burst() -> None:
    phases = phases_of((64,), (4,), 1)
    calls = [sample(9, 1)] * 8 + [sample(30, 1, 4), sample(70, 3)]
    with pytest.raises(BurstStuckError, match="no burst of 4 frames"):
        _points(SwitchPath.VMFUNC, 2, 1.0, phases, calls, {0: exits(1), 1: exits(1)})


def test_exits() -> None:
    both = exits(10, 3) + exits(5, 1)
    assert both.own == 15 - 4 - 2
    assert both.as_dict() == {"own": 9, "marks": 2, "exits": 15, "irq_exits": 4}


def test_cost_of_an_exchange(host: str) -> None:
    """The same burst of each round is one group, however long the others took."""
    rounds = [
        [sample(100, 2), sample(60, 1)],
        [sample(110, 2), sample(9000, 1)],
        [sample(105, 2), sample(64, 1)],
    ]
    result = Exchange(
        path=SwitchPath.VMFUNC,
        frames=3,
        sent=9,
        delivered=9,
        corrupted=0,
        dropped={"too_short": 1, "full": 2},
        exits=exits(10),
        samples=[[call for calls in rounds for call in calls], []],
        lengths=[3, 0],
    )
    assert result.ticks_per_packet == ((100 + 60) if host == "emulated" else (105 + 64)) / 3
    assert result.vm_exits_per_packet == 1
    record = result.as_dict()
    assert (record["dropped"], record["drop_reasons"]["full"]) == (3, 2)
    assert record["bursts"][0][0] == [100, 2]
