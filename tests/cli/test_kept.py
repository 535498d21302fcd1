"""The line that names the files of a measurement."""

from pathlib import Path

import pytest

from pykvm.cli.kept import keep_charts
from pykvm.extras import ExtraMissingError
from pykvm.measure.charts import ChartError

pytestmark = pytest.mark.unit

_RECORD = Path("build/demo/results.json")


def test_record_and_charts(capsys: pytest.CaptureFixture[str]) -> None:
    keep_charts(_RECORD, lambda stem: [stem.with_suffix(".svg")])
    assert capsys.readouterr().out == f"kept: {_RECORD}, build/demo/results.svg\n"


def test_without_matplotlib_the_record_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(_: Path) -> list[Path]:
        raise ExtraMissingError("charts", "matplotlib")

    keep_charts(_RECORD, draw)
    captured = capsys.readouterr()
    assert captured.out == f"kept: {_RECORD}\n"
    assert captured.err.startswith("pykvm: no charts: the Python package matplotlib is missing: ")


def test_chart_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(_: Path) -> list[Path]:
        raise ChartError("no room")

    with pytest.raises(ChartError):
        keep_charts(_RECORD, draw)
    assert capsys.readouterr().out == f"kept: {_RECORD}\n"
