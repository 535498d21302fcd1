"""Let GDB at a running machine."""

import argparse
import shutil
import signal
import subprocess
from typing import Any

from pykvm.cli.named import add_named_parser, ask
from pykvm.errors import PykvmError

__all__ = ["add_parser", "run"]

_EPILOG = """\
The machine stands while GDB is connected. Without --print, GDB is started; what is behind -- are
its own arguments, such as the file with the kernel's symbols.
"""


def add_parser(subparsers: Any) -> None:
    """Add `pykvm gdb` to the command line."""
    parser = add_named_parser(
        subparsers,
        "gdb",
        __doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--print", action="store_true", help="print what to type in GDB, and start none"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Start the stub and GDB; return the exit status.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses.
        PykvmError: there is no GDB here.
    """
    from pykvm.host.advice import install  # noqa: PLC0415

    target = f"target remote {ask(options, 'gdb')}"
    if options.print:
        print(target)
        return 0
    found = shutil.which("gdb")
    if found is None:
        raise PykvmError("no gdb on this machine", install(["gdb"]))
    more = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is GDB's, which stops the machine by it
    return subprocess.run([found, "-ex", target, *more], check=False).returncode
