"""Command line of `make fresh`."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.cache import scratch
from pykvm.cli.signals import exit_on_signals
from pykvm.errors import PykvmError
from pykvm.host.distribution import DEBIAN_RELEASES
from tools.fresh import machine, mirrors, system
from tools.fresh.system import FreshError

README: Final = ("make demo", "make test")

_CLONE: Final = "/root/pykvm"


@dataclass(frozen=True)
class Outcome:
    """Result of one command.

    Attributes:
        command: the command.
        status: exit status; None if the command was not run.
        seconds: seconds that it took.
    """

    command: str
    status: int | None
    seconds: float


class _Narrator:
    """Progress messages on standard output, with the seconds so far."""

    def __init__(self, debian: str) -> None:
        self._debian = debian
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        seconds = time.monotonic() - self._start
        print(f"fresh Debian {self._debian}: [{seconds:6.1f} s] {message}", flush=True)


def check(
    root: Path, commands: Sequence[str], tell: Callable[[str], None], directory: str = _CLONE
) -> list[Outcome]:
    """Run commands in turn, up to the first that fails.

    Args:
        root: root file system in which to run them.
        commands: shell commands.
        tell: called with each command before it runs.
        directory: working directory, in `root`.
    """
    outcomes: list[Outcome] = []
    for command in commands:
        if outcomes and outcomes[-1].status != 0:
            outcomes.append(Outcome(command, None, 0))
            continue
        tell(command)
        start = time.monotonic()
        environment = mirrors.environment(os.environ)
        status = machine.run(root, command, directory=directory, environment=environment)
        outcomes.append(Outcome(command, status, time.monotonic() - start))
    return outcomes


def _fresh(debian: str, commands: Sequence[str], keep: bool) -> int:
    tell = _Narrator(debian)
    archive = system.base(debian, tell)
    with scratch.directory("fresh-machines") as work:
        root = work / "root"
        tell("unpacking it")
        system.unpack(archive, root)
        mirrors.carry_in(root)
        system.clone(root / _CLONE.lstrip("/"), tell)
        try:
            prepared = check(root, ["update-ca-certificates >/dev/null"], tell)
            outcomes = prepared if prepared[0].status else check(root, commands, tell)
        finally:
            if keep:
                _keep(root, tell)
            else:
                tell("removing it")
    for outcome in outcomes:
        if outcome.status is None:
            tell(f"not run: {outcome.command}")
        else:
            tell(f"status {outcome.status}, {outcome.seconds:.0f} s: {outcome.command}")
    return 1 if any(outcome.status != 0 for outcome in outcomes) else 0


def _keep(root: Path, tell: Callable[[str], None]) -> None:
    kept = cache.root() / "fresh-kept"
    kept.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(dir=kept))
    root.rename(target)
    tell(f"kept; to enter: {sys.executable} -m tools.fresh --enter {target}")
    tell(f"to remove: rm -r {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make fresh",
        description="Run commands in a clone of HEAD, on a Debian with nothing but make and git.",
    )
    parser.add_argument("--debian", choices=DEBIAN_RELEASES, default="12")
    parser.add_argument(
        "--run",
        metavar="COMMANDS",
        help="what to run instead of the README's commands; parted by &&, each has a shell and a "
        "line in the summary of its own",
    )
    parser.add_argument("--keep", action="store_true", help="leave the system for a look")
    parser.add_argument(
        "--enter", type=Path, metavar="DIRECTORY", help="open a shell in a kept one"
    )
    options = parser.parse_args(arguments)
    commands = README
    if options.run is not None:
        commands = tuple(filter(None, (part.strip() for part in options.run.split("&&"))))
        if not commands:
            parser.error("--run names no command")
    exit_on_signals()
    try:
        if os.geteuid() != 0:
            raise FreshError("a root file system is made by root", "type: sudo make fresh")
        if options.enter:
            environment = mirrors.environment(os.environ)
            machine.enter(options.enter, directory=_CLONE, environment=environment)
        return _fresh(options.debian, commands, options.keep)
    except PykvmError as error:
        print(f"make fresh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
