"""Print how a machine's own page tables translate an address, level by level."""

import argparse
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm walk` to the command line."""
    parser = subparsers.add_parser("walk", help=(__doc__ or "").rstrip("."), description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the machine's name, see pykvm ps")
    parser.add_argument(
        "address", metavar="ADDRESS", help="a virtual address, such as 0xffffffff81000000"
    )
    parser.add_argument("--cpu", type=int, default=0, metavar="N", help="the processor (default 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the walk; return the exit status.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses, or the text is no address.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415

    with MachineClient(options.name) as client:
        print(client.request("walk", address=options.address, cpu=options.cpu))
    return 0
