"""Charts of a measurement, and its last line: the names of the record and of the charts."""

import sys
from collections.abc import Callable
from pathlib import Path

from pykvm.extras import ExtraMissingError

__all__ = ["keep_charts"]


def keep_charts(record: Path, draw: Callable[[Path], list[Path]]) -> None:
    """Draw charts beside the record, and print the names of all files.

    If matplotlib is missing, a line on standard error says how to install it, and no charts are
    drawn.

    Args:
        record: file of the record.
        draw: function that gets the path of the charts without a suffix, and returns the files
            that it wrote.

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
