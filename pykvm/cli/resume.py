"""Let a paused machine run on."""

import argparse
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm resume` to the command line."""
    parser = subparsers.add_parser("resume", help=(__doc__ or "").rstrip("."), description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the machine's name, see pykvm ps")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask the machine; return the exit status.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415

    with MachineClient(options.name) as client:
        client.request("resume")
    return 0
