"""Run a command on the emulated Intel host, or a shell there."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pykvm.cli.signals import exit_on_signals
from pykvm.errors import PykvmError
from pykvm.kernel.series import SERIES
from pykvm.testbed import Testbed, session
from pykvm.testbed.bochs import CPUS, DEFAULT_CPU, MEMORIES, MEMORY, MOST_CPUS

__all__ = ["add_also", "add_parser", "run"]

_SHELL = ["bash", "-i"]

_EPILOG = """\
examples:
  pykvm testbed -- uname -r
  pykvm testbed -- python3 -m pytest -m elisa tests
  pykvm testbed --series 6.12 -- uname -r
  pykvm testbed --cpu sapphire_rapids -- uname -r
  pykvm testbed --stock -- ls -l /dev/kvm
  pykvm testbed --bring notes.txt -- sh -c 'dmesg > notes.txt'
  pykvm testbed                         (a shell)
  pykvm testbed < SCRIPT
"""


def add_parser(subparsers: Any) -> None:
    """Add `pykvm testbed` to the command line."""
    parser = subparsers.add_parser(
        "testbed",
        help=(__doc__ or "").strip().rstrip("."),
        description="Run COMMAND on the emulated Intel host, in the current folder, whose files "
        "are there (in a git checkout, git's). Its output and exit status are the command's; what "
        "it writes below build/ comes back. In pykvm's own checkout, all of that is carried along.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--series",
        choices=SERIES,
        help="of the host's kernel, the newest one of which runs (default: 6.1 where Debian has "
        "it, else the newest that Debian has)",
    )
    parser.add_argument(
        "--cpu",
        choices=CPUS,
        default=DEFAULT_CPU,
        help="the emulated processor; sapphire_rapids has five-level paging, APICv, CET and PKS, "
        f"and needs Bochs 3.0, which is fetched where the installed one is older "
        f"(default: {DEFAULT_CPU})",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="run up to twice as fast, on Bochs 3.0 without its debugger; instructions are then "
        "not counted exactly, so nothing can be measured",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        choices=range(1, MOST_CPUS + 1),
        default=1,
        help="how many processors, which take turns: for races between them, not for speed; "
        "instructions are not counted exactly (default: 1)",
    )
    parser.add_argument(
        "--memory",
        type=int,
        choices=MEMORIES,
        default=MEMORY,
        help=f"MiB of memory of the host; more takes longer to resume (default: {MEMORY})",
    )
    kvm = parser.add_mutually_exclusive_group()
    kvm.add_argument(
        "--modules",
        type=Path,
        metavar="DIR",
        help="load kvm.ko and kvm-intel.ko from DIR (default: the patched ones)",
    )
    kvm.add_argument("--stock", action="store_true", help="load the distribution's KVM")
    kvm.add_argument("--no-kvm", action="store_true", help="load no KVM at all")
    add_also(parser)
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="end after S seconds, with exit status 124"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="carry DIR along and run there (default: the current folder)",
    )
    parser.add_argument(
        "--bring",
        action="append",
        default=[],
        metavar="PATH",
        help="bring PATH back too, if the command changes it (may be given several times)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a variable inside (may be given several times)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="boot the host if the cache lacks it; run nothing"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    parser.set_defaults(run=run)


def add_also(parser: argparse.ArgumentParser) -> None:
    """Add the option `--also PATCH`; its paths are in `options.also`."""
    parser.add_argument(
        "--also",
        action="append",
        type=Path,
        default=[],
        metavar="PATCH",
        help="build the patched modules with PATCH on top, for tests only: what comes out calls "
        "itself a test build (may be given several times)",
    )


def run(options: argparse.Namespace) -> int:
    """Run `pykvm testbed`; return the exit status of the command inside, or 124 after a timeout.

    Raises:
        PykvmError: options exclude each other, or the command cannot be run.
    """
    exit_on_signals()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    kvm = "stock" if options.stock else "none" if options.no_kvm else "payload"
    if options.also and (options.modules or kvm != "payload"):
        raise PykvmError("--also goes with the patched modules", "leave out --modules and --stock")
    testbed = Testbed(
        options.folder,
        series=options.series,
        cpu=options.cpu,
        fast=options.fast,
        cpus=options.cpus,
        memory=options.memory,
    )
    if options.dry_run:
        plan = testbed.plan(command or _SHELL, kvm=kvm, modules=options.modules, also=options.also)
        print("\n".join(plan))
        return 0
    if options.prepare:
        testbed.prepare(kvm, options.modules, options.also)
        return 0
    script = not command and not sys.stdin.isatty()  # pykvm testbed < script
    try:
        outcome = testbed.run(
            command or (["bash", "-s"] if script else _SHELL),
            modules=options.modules,
            also=options.also,
            kvm=kvm,
            timeout=options.timeout,
            environment=_environment(options.env),
            bring=options.bring,
            stdout=_writer(sys.stdout.fileno(), "standard output"),
            stderr=_writer(sys.stderr.fileno(), "standard error"),
            stdin=sys.stdin.buffer.read() if script else b"",
            interactive=not command and not script,
            directory=None if options.folder else Path.cwd(),
        )
    except session.CommandTimeoutError as error:
        print(f"pykvm testbed: {error}", file=sys.stderr)
        return 124
    return outcome.status


def _environment(assignments: list[str]) -> dict[str, str]:
    variables = {"TERM": os.environ.get("TERM", "dumb") if sys.stdout.isatty() else "dumb"}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise PykvmError(
                f"--env {shlex.quote(assignment)} sets no variable", "write NAME=VALUE"
            )
        variables[name] = value
    return variables


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _writer(descriptor: int, name: str) -> session.Sink:
    def write(data: bytes) -> None:
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, name) from error

    return write
