"""Samples, and records that are read back as they were written."""

import json
import random
from pathlib import Path

import pytest

from pykvm.measure.records import (
    RecordError,
    Samples,
    read_record,
    require_writable,
    typical,
    unit_of_host,
    write_record,
)

pytestmark = pytest.mark.unit


def test_units() -> None:
    """A count is never called a time."""
    assert unit_of_host("emulated") == "instructions"
    assert unit_of_host("hardware") == "ns"


def test_counts_take_the_least_and_times_the_median() -> None:
    values = [44, 44, 9000, 45, 51]
    assert typical(values, counted=True) == 44
    assert typical(values, counted=False) == 45
    assert Samples(values, overhead=8, counted=True).cost == 36
    assert Samples(values, 0.5, 8).cost == 18.5


@pytest.mark.parametrize("seed", range(50))
def test_a_record_gives_the_figure_again(seed: int) -> None:
    """Stored data gives back the raw readings, and these give the figure."""
    dice = random.Random(seed)
    values = [dice.randrange(1 << dice.randrange(1, 40)) for _ in range(dice.randrange(1, 20))]
    scale, overhead = dice.choice([1.0, 0.5, 0.25]), dice.randrange(1000)
    counted = dice.random() < 0.5
    samples = Samples(values, scale, overhead, counted)
    stored = json.loads(json.dumps(samples.as_dict()))
    raw = [sample / stored["scale"] + stored["overhead"] for sample in stored["samples"]]
    assert raw == values
    figure = min(stored["samples"]) if stored["figure"] == "min" else stored["median"]
    assert figure == samples.cost
    assert stored["max"] == max(stored["samples"])


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "record.json"
    record = {"host": "emulated", "paths": [{"name": "vmfunc", "cost": 36.0}]}
    write_record(path, record)
    assert read_record(path) == record
    write_record(path, {"host": "hardware"})
    assert read_record(path) == {"host": "hardware"}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "record.json", tmp_path):
        with pytest.raises(RecordError, match="name a file in a folder that you can write to"):
            write_record(path, {})
        with pytest.raises(RecordError, match="name a file in a folder that you can write to"):
            require_writable(path)


def test_a_folder_that_can_be(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "record.json")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot read"), ("{", "is not a record"), ("[1]", "is not a record: measure again")],
)
def test_what_is_no_record(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=says) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
