"""Save a running machine to a folder."""

import argparse
from pathlib import Path
from typing import Any

from pykvm.cli.named import add_named_parser, ask

__all__ = ["add_parser", "run"]

_PATIENCE = 3600.0  # seconds; memory may be large, and the disk slow


def add_parser(subparsers: Any) -> None:
    """Add `pykvm snapshot` to the command line."""
    parser = add_named_parser(
        subparsers,
        "snapshot",
        __doc__,
        description=f"{__doc__} It stands still meanwhile, and runs on afterwards unless it was "
        "paused. See pykvm restore.",
    )
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
    path = str(options.folder.absolute())
    size = ask(options, "snapshot", patience=_PATIENCE, path=path)
    print(f"{size / (1 << 20):.1f} MiB of memory; to go on: pykvm restore {options.folder}")
    return 0
