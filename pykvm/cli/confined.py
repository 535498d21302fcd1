"""Options that say what the process of a machine may do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvm.sandbox import Confinement

__all__ = ["add_confinement", "confinement_of"]


def add_confinement(parser: argparse.ArgumentParser) -> None:
    """Add `--snapshots DIR` and `--no-sandbox`."""
    parser.add_argument(
        "--snapshots",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="directory in which pykvm snapshot may save it (may be given several times)",
    )
    parser.add_argument(
        "--no-sandbox",
        action="store_true",
        help="do not confine this process to what the machine needs",
    )


def confinement_of(options: argparse.Namespace) -> Confinement | None:
    """Return the confinement that the options ask for; None for none."""
    from pykvm.sandbox import Confinement  # noqa: PLC0415  (--help needs none of it)

    if options.no_sandbox:
        return None
    return Confinement(writable=tuple(path.absolute() for path in options.snapshots))
