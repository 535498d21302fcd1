"""The native benchmark of the switch, run as its documentation says, with one sample a row."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import native_switch

pytestmark = pytest.mark.unit

_SCRIPT = native_switch.LOOP.with_suffix(".py")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


def test_table_and_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    done = _run("--samples", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["bytes", "burst", "ns/packet", "min", "max"]
    record = json.loads(path.read_text())
    assert record["unit"] == "ns"
    wanted = list(itertools.product(native_switch.SIZES, native_switch.BURSTS))
    assert [(row["size"], row["burst"]) for row in record["rows"]] == wanted
    assert [tuple(map(int, line.split()[:2])) for line in lines] == wanted
    for line, row in zip(lines, record["rows"], strict=True):
        (sample,) = row["ns_per_packet"]["samples"]
        assert sample > 0
        assert line.split()[2:] == [f"{sample:.1f}"] * 3


@pytest.mark.parametrize("number", ["0", "-1", "10001"])
def test_number_of_samples(number: str) -> None:
    done = _run("--samples", number)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"native_switch: --samples {number} is out of range: use 1 to 10000\n"


def test_record_that_cannot_be_written(tmp_path: Path) -> None:
    done = _run("--json", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is a directory" in done.stderr.lower()
