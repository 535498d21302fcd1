"""Print how a machine's own page tables translate an address, level by level."""

import argparse
from typing import Any

from pykvm.cli.named import add_named_parser, ask

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm walk` to the command line."""
    parser = add_named_parser(subparsers, "walk", __doc__)
    parser.add_argument(
        "address", metavar="ADDRESS", help="a virtual address, such as 0xffffffff81000000"
    )
    parser.add_argument("--cpu", type=int, default=0, metavar="N", help="the processor (default 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the walk; return the exit status.

    Raises:
        MachineNameError, ControlError: see `pykvm.cli.named.ask`; or the text is no address.
    """
    print(ask(options, "walk", address=options.address, cpu=options.cpu))
    return 0
