"""The last line of a measurement: its record, and the charts that were drawn from it."""

import sys
from collections.abc import Callable
from pathlib import Path

from pykvm.extras import ExtraMissingError

__all__ = ["keep_charts"]


def keep_charts(record: Path, draw: Callable[[Path], list[Path]]) -> None:
    """Draw charts beside the file `record`, and print what is kept.

    draw: gets their path without a suffix, and returns the files that it wrote. Where matplotlib
    is missing, a line on standard error says how to get it; the record is kept in any case.

    Raises:
        ChartError: see `pykvm.measure.charts`.
    """
    kept = [record]
    try:
        kept += draw(record.with_suffix(""))
    except ExtraMissingError as error:
        print(f"pykvm: no charts: {error}", file=sys.stderr)
    finally:
        print("kept: " + ", ".join(map(str, kept)))
