"""Go on with a machine that was saved to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pykvm.cli.confined import add_confinement, confinement_of
from pykvm.cli.signals import exit_on_signals

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm restore` to the command line."""
    parser = subparsers.add_parser(
        "restore",
        help=(__doc__ or "").rstrip("."),
        description=f"{__doc__} Its memory is read from the folder while it is used, so the folder "
        "must stay as it is. Its console is this terminal; Ctrl-] ends it.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what pykvm snapshot wrote")
    parser.add_argument("--name", default="", help="the machine's name")
    add_confinement(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the machine until it ends; return the exit status.

    Raises:
        PykvmError: see `pykvm.machine.linux.machine.LinuxMachine.restore` and its `run`.
    """
    from pykvm.kvm import Kvm  # noqa: PLC0415  (--help needs none of it)
    from pykvm.machine.linux.foreground import run_in_foreground, status_of  # noqa: PLC0415
    from pykvm.machine.linux.machine import LinuxMachine  # noqa: PLC0415

    exit_on_signals()
    with Kvm() as kvm, LinuxMachine.restore(kvm, options.folder, 1) as machine:
        return status_of(run_in_foreground(machine, options.name, confinement_of(options)), machine)
