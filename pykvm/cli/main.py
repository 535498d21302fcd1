"""The `pykvm` command: runs the subcommand, and prints its errors in one line.

Exit status: the subcommand's own, 1 for an error that the user can act on, 2 for wrong usage,
130 after Ctrl-C, 141 after a broken pipe. Mistakes in pykvm itself end in a traceback.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykvm.cli import streams
from pykvm.cli.failures import explained
from pykvm.errors import PykvmError

__all__ = ["main"]

# Each has a module in this package, whose docstring's first line is printed by --help.
SUBCOMMANDS = (
    *("doctor", "demo", "demo-linux", "run", "ps", "console", "pause", "resume", "stop"),
    *("snapshot", "restore", "report", "walk", "gdb"),
    *("bench", "kernel", "testbed", "verify-gate", "cache"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a `pykvm` command line; return the exit status.

    Args:
        arguments: arguments without the program's name; by default the process's own.
    """
    streams.prepare()
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except PykvmError as error:
        status = _say(error)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141  # the reader has gone (`pykvm doctor | head`)
    except (OSError, MemoryError, UnicodeError) as error:
        told = explained(error)
        if told is None:
            raise
        status = _say(told)
    streams.settle()
    return status


def _run(argv: list[str]) -> int:
    try:
        options = _parser(argv[0] if argv else "").parse_args(argv)
        status: int = options.run(options)
    finally:
        sys.stdout.flush()
    return status


def _say(error: PykvmError) -> int:
    """Print `error` on standard error, if that can be written; return the exit status."""
    with contextlib.suppress(OSError):
        print(f"pykvm: {error}", file=sys.stderr, flush=True)
    return 1


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Return the parser, with the options of the `chosen` subcommand only.

    The other subcommands are not imported, because that takes seconds on the emulated host.
    """
    parser = _Parser(
        prog="pykvm",
        description="virtual machines that share without exits (ELISA)",
        epilog="start with: pykvm doctor",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
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


class _Parser(argparse.ArgumentParser):
    """Parser whose help is printed or fails; argparse's own ignores errors of the stream."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)


class _Version(argparse.Action):
    """Action that prints the version.

    argparse's own action would need the version, and thus read it, for every command.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from pykvm.version import version  # noqa: PLC0415

        print(f"pykvm {version()}")
        parser.exit()


def _first_line(source: Path) -> str:
    with source.open(encoding="utf-8") as lines:
        return lines.readline().strip().strip('"').rstrip(".").replace("%", "%%")
