"""Let two Linux guests ping each other, fetch a file, and use memcached, over virtio-net."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Final

from pykvm.cli.hosts import can_run_linux, on_suitable_host
from pykvm.cli.kept import keep_charts
from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.host.emulation import host_kind, is_emulated
from pykvm.measure.charts import draw_linux_pair
from pykvm.measure.fingerprint import fingerprint
from pykvm.measure.linux_pair import KINDS, PairError, measure_pair
from pykvm.measure.records import unit_of_host

__all__ = ["add_parser", "run"]

RESULTS: Final = Path("build/demo/linux.json")

_PROGRAMS: Final = {"memcached": "memcached", "ping": "iputils-ping"}
_MEMORY: Final = "128M"
_TICKS_PER_NANOSECOND: Final = 0.045  # of the emulated host, where a tick is an instruction


def add_parser(subparsers: Any) -> None:
    """Add `pykvm demo-linux` to the command line."""
    parser = subparsers.add_parser("demo-linux", help=(__doc__ or "").rstrip("."))
    parser.add_argument(
        "--requests",
        type=int,
        default=100,
        metavar="N",
        help="sets, and gets, of memcached (default 100)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"where to keep the results (default {RESULTS}); charts go beside it",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the guests here or on the emulated host, then print the table and draw the chart.

    Raises:
        PairError: an answer was wrong, or a guest has failed.
        PykvmError: a program is missing, or the network cannot be made.
    """
    if not 1 <= options.requests <= 100_000:
        raise PykvmError(f"--requests {options.requests}", "use 1 to 100000")

    def measure() -> dict[str, Any]:
        return _measure(options.requests)

    record = on_suitable_host(
        measure,
        ["demo-linux", "--requests", str(options.requests)],
        files={},
        out=options.json,
        here=can_run_linux,
    )
    if is_emulated():
        return 0  # the command that started this one shows the results
    print(table(record), flush=True)
    keep_charts(options.json, partial(draw_linux_pair, record))
    wrong = [name for name, found in record["kinds"].items() if found["right"] != found["sent"]]
    if wrong:
        raise PairError(f"answers were missing or wrong ({', '.join(wrong)})", "try again")
    return 0


def _measure(requests: int) -> dict[str, Any]:
    for name, package in _PROGRAMS.items():
        if shutil.which(name) is None:
            raise PykvmError(f"no {name} on this machine", install([package]))
    if is_emulated():
        subprocess.run(["modprobe", "-a", "tun", "bridge", "vhost_net"], check=True)
    found = measure_pair(requests, _MEMORY)
    scale = _TICKS_PER_NANOSECOND if is_emulated() else 1.0
    for kind in found.values():
        kind["cost"] = kind["median"] * scale
    return {
        "host": host_kind(),
        "unit": unit_of_host(host_kind()),
        "fingerprint": fingerprint(),
        "data_plane": "vhost-net" if Path("/dev/vhost-net").exists() else "pykvm's own loop",
        "kinds": found,
    }


def table(record: dict[str, Any]) -> str:
    """Return the results as a table of text."""
    unit = record["unit"]
    rows = [["what", "sent", "right", f"median {unit}"]]
    rows += [
        [KINDS[name], str(found["sent"]), str(found["right"]), f"{found['cost']:,.0f}"]
        for name, found in record["kinds"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    where = (
        "emulated Intel host: instructions are counted, which says nothing about time"
        if record["host"] == "emulated"
        else record["fingerprint"]["cpu"]
    )
    notes = [f"({where})", f"(frames by {record['data_plane']})"]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])
