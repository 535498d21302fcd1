"""Show that the built gate, sub entry and return code keep their invariants."""

import argparse
import random
from typing import Any

from pykvm.extras import ExtraMissingError

__all__ = ["add_parser", "run"]

_EPILOG = "What is claimed, and under which assumptions: docs/gate-proof.md. Exit status: 1 if not."


def add_parser(subparsers: Any) -> None:
    """Add `pykvm verify-gate` to the command line."""
    parser = subparsers.add_parser("verify-gate", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--seed", type=int, help="of the random states; another one each time")
    parser.add_argument(
        "--states", type=int, default=60, help="random states for each byte of code (60)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and print the report; return the exit status.

    Raises:
        ExtraMissingError: a package of the optional dependency ``verify`` is missing.
    """
    try:
        from pykvm.verify.report import verify  # noqa: PLC0415 (needs packages of its own)
    except ModuleNotFoundError as error:
        raise ExtraMissingError("verify", str(error.name)) from error
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    sections = verify(seed, args.states)
    for section in sections:
        print(section)
    fell_short = [section for section in sections if not section.holds]
    print(f"verify-gate: {len(sections) - len(fell_short)} of {len(sections)} hold (seed {seed})")
    return 1 if fell_short else 0
