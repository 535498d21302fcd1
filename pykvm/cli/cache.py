"""Say what the cache holds, and remove what has not been used for long."""

import argparse
import time
from typing import Any

from pykvm import cache
from pykvm.cache import pruning as cache_pruning

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Say how much the cache holds of which kind, and when it was last used. Everything in it can be
built or fetched again. What has not been used for {days:g} days is removed by itself; --prune
removes more, but nothing that was used within the last hour or that a process has locked.
"""


def add_parser(subparsers: Any) -> None:
    """Add `pykvm cache` to the command line."""
    parser = subparsers.add_parser(
        "cache", description=_DESCRIPTION.format(days=cache_pruning.KEPT_DAYS)
    )
    parser.add_argument(
        "--prune",
        type=_days,
        metavar="DAYS",
        help="first remove what has not been used for this many days (0: all but the last hour's)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `pykvm cache`; return the exit status."""
    if options.prune is not None:
        print(f"removed: {cache_pruning.prune(options.prune)}")
    kinds = cache_pruning.kinds()
    print(f"{'kind':20} {'entries':>7} {'MiB':>8}  last used")
    for kind in kinds:
        print(f"{kind.name:20} {kind.entries:7} {kind.size / 2**20:8.1f}  {_day(kind.last_used)}")
    size = sum(kind.size for kind in kinds)
    print(f"{'all':20} {sum(k.entries for k in kinds):7} {size / 2**20:8.1f}  in {cache.root()}")
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else "-"


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days")
    return days
