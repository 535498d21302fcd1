"""End a running machine as it is, as if its power failed."""

import argparse
from typing import Any

from pykvm.cli.named import add_named_parser, ask

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm stop` to the command line."""
    add_named_parser(subparsers, "stop", __doc__).set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask the machine; return the exit status.

    Raises:
        MachineNameError, ControlError: see `pykvm.cli.named.ask`.
    """
    ask(options, "stop")
    return 0
