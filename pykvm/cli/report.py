"""Print what a machine's processors do: registers, instruction, page walk and last exits."""

import argparse
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm report` to the command line."""
    parser = subparsers.add_parser("report", help=(__doc__ or "").rstrip("."), description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the machine's name, see pykvm ps")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; return the exit status.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415

    with MachineClient(options.name) as client:
        print(client.request("report"))
    return 0
