"""Let a paused machine run on."""

import argparse
from typing import Any

from pykvm.cli.named import add_named_parser, ask

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm resume` to the command line."""
    add_named_parser(subparsers, "resume", __doc__).set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask the machine; return the exit status.

    Raises:
        MachineNameError, ControlError: see `pykvm.cli.named.ask`.
    """
    ask(options, "resume")
    return 0
