"""Let a running machine stand still."""

import argparse
from typing import Any

from pykvm.cli.named import add_named_parser, ask

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm pause` to the command line."""
    add_named_parser(subparsers, "pause", __doc__).set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask the machine; return the exit status.

    Raises:
        MachineNameError, ControlError: see `pykvm.cli.named.ask`.
    """
    ask(options, "pause")
    return 0
