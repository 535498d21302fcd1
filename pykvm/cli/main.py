"""The `pykvm` command: finds the subcommand, runs it, and turns errors into one line.

Exit status: the subcommand's own, 1 for an error that the user can act on, 2 for wrong usage,
130 after Ctrl-C.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = ["main"]

# One module of this package each; the first line of its docstring is what --help says.
SUBCOMMANDS = ("doctor", "demo", "bench", "kernel", "testbed", "verify-gate", "cache")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `pykvm` command line, by default the process's own; return the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(argv[0] if argv else "")
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except PykvmError as error:
        print(f"pykvm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`pykvm doctor | head`): nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser, with the options of the `chosen` subcommand only.

    The others are not imported: on the emulated host that would take seconds.
    """
    parser = argparse.ArgumentParser(
        prog="pykvm",
        description="virtual machines that share without exits (ELISA)",
        epilog="start with: pykvm doctor",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        module = name.replace("-", "_")
        source = Path(__file__).with_name(f"{module}.py")
        if not source.is_file():
            continue
        if name == chosen:
            importlib.import_module(f"pykvm.cli.{module}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=_first_line(source))
    return parser


def _first_line(source: Path) -> str:
    with source.open(encoding="utf-8") as lines:
        return lines.readline().strip().strip('"').rstrip(".").replace("%", "%%")
