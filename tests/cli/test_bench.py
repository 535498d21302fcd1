"""Output and files of each `pykvm bench`, with few repetitions."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pykvm.measure.records import read_record

_KINDS = {
    "crossing": ["--calls", "10"],
    "protections": ["--calls", "10"],
    "attach": ["--repeats", "2", "--sizes", "1,512"],
    "switch": ["--sizes", "64,1514", "--bursts", "1,32", "--guests", "2", "--repeats", "1"],
    "interrupts": ["--count", "2", "--left", "0,1000"],
}
# First words of the lines that report a measurement.
_LINES = {
    "crossing": ["vmfunc", "vmcall_kernel", "vmcall_user", "direct"],
    "attach": ["register", "attach,", "attach,", "detach", "revoke"],
    "switch": ["2", "2", "2", "2"],
    "interrupts": ["0", "1000"],
}


def _bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from pykvm.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, "bench", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _starting_with(words: Sequence[str], text: str) -> list[str]:
    firsts = (line.split()[0] for line in text.splitlines() if line.strip())
    return [first for first in firsts if first in words]


@pytest.mark.testbed
@pytest.mark.parametrize("kind", _KINDS)
def test_measurement(kind: str, tmp_path: Path) -> None:
    done = _bench(kind, *_KINDS[kind], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path("build") / "bench" / f"{kind}.json"
    kept = [str(path)]
    if kind != "attach":
        kept += [str(path.with_suffix(suffix)) for suffix in (".svg", ".png")]
    assert done.stdout.splitlines()[-1] == f"kept: {', '.join(kept)}"
    assert {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*.*")} == set(kept)
    assert "instructions" in done.stdout
    assert _starting_with(_LINES.get(kind, ()), done.stdout) == _LINES.get(kind, [])
    record = read_record(tmp_path / path)
    assert (record["host"], record["unit"]) == ("emulated", "instructions")
    assert json.dumps(record).count('"samples"') >= 1
    if kind == "attach":
        check_attach(record)


def check_attach(record: dict[str, Any]) -> None:
    """An attachment costs the same for objects of any size, and the 64th as much as the first."""
    objects = record["objects"]
    assert [one["mib"] for one in objects] == [1, 512]
    costs = [one[name]["cost"] for one in objects for name in ("attach first", "attach last")]
    assert max(costs) <= 1.1 * min(costs), costs
    pages = [charged for one in objects for charged in one["pages"]["charged"]]
    assert len(pages) == 2 * 64
    assert max(pages) <= 1.1 * min(pages), pages
    for one in objects:
        # The memory, the windows and a table; where no huge page was to be had, more tables.
        least = one["mib"] * 256 + 64
        tables = one["registered"]["tables"]
        assert one["registered"]["charged"] == least + tables
        assert tables <= 1 + -(-least // 512) - one["registered"]["large"]


@pytest.mark.unit
def test_nothing_is_measured_where_counts_are_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKVM_TESTBED", "fast")
    done = _bench("crossing", cwd=tmp_path)
    assert done.returncode == 1
    message = "this emulated host does not count every instruction: leave out --fast and --cpu"
    assert done.stderr == f"pykvm: {message}\n"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("crossing", "--calls", "0"), "--calls 0 is out of range: use 1 to 100000"),
        (("switch", "--sizes", "64,1515"), "--sizes 1515 is out of range: use 14 to 1514"),
        (("switch", "--guests", "1"), "--guests 1 is out of range: use 2 to 8"),
        (("interrupts", "--left", "-1"), "--left -1 is out of range: use 0 to 100000000"),
    ],
)
def test_numbers_are_checked_first(arguments: Sequence[str], message: str, tmp_path: Path) -> None:
    done = _bench(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"pykvm: {message}\n")


@pytest.mark.unit
def test_record_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    done = _bench("crossing", "--json", "/proc/none/record.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pykvm: cannot write /proc/none/record.json (")
