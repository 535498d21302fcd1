"""List this user's running machines."""

import argparse
import json
import time
from typing import Any

from pykvm.errors import PykvmError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm ps` to the command line."""
    parser = subparsers.add_parser("ps", help=(__doc__ or "").rstrip("."), description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON array")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """List the machines; return the exit status."""
    from pykvm.control.client import MachineClient  # noqa: PLC0415
    from pykvm.control.directory import names_of_running  # noqa: PLC0415

    found = []
    for name in names_of_running():
        try:
            with MachineClient(name, patience=5) as client:
                found.append(client.request("status"))
        except PykvmError:
            continue  # it has ended in between
    if options.json:
        print(json.dumps(found))
        return 0
    rows = [["NAME", "STATE", "CPUS", "MEMORY", "FOR", "PID", "KERNEL"]]
    for one in found:
        minutes, seconds = divmod(int(max(time.time() - one["started"], 0)), 60)
        rows.append(
            [
                *(one["name"], one["state"], str(one["cpus"]), f"{one['memory'] >> 20} MiB"),
                *(f"{minutes}:{seconds:02}", str(one["pid"]), one["kernel"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0
