"""Save a running machine to a folder."""

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm snapshot` to the command line."""
    parser = subparsers.add_parser(
        "snapshot",
        help=(__doc__ or "").rstrip("."),
        description=f"{__doc__} It stands still meanwhile, and runs on afterwards unless it was "
        "paused. See pykvm restore.",
    )
    parser.add_argument("name", metavar="NAME", help="the machine's name, see pykvm ps")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a folder that is not there yet"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Save the machine; return the exit status.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine cannot be saved.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415

    with MachineClient(options.name, patience=3600) as client:
        size = client.request("snapshot", path=str(options.folder.absolute()))
    print(f"{size / (1 << 20):.1f} MiB of memory; to go on: pykvm restore {options.folder}")
    return 0
