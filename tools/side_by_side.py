"""Run commands side by side, as many as there are processors, and show their outputs in turn.

    python -m tools.side_by_side [--processors N] "COMMAND" ...

The first command's output is shown as it comes, and each other's from its start once those before
it have ended. Ctrl-C reaches all of them, and all have ended before this one does. The exit
status is 1 if any of them failed.
"""

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Final

from pykvm.cli.signals import exit_on_signals

_PATIENCE: Final = 20.0  # seconds, for what was interrupted to end by itself
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Job:
    """A command and what to call it.

    environment: variables to set, or (None) to unset. after: the name of an earlier job that must
    have ended before this one starts, well or not.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    after: str = ""


class _Running:
    """A job that was started; its output goes to a file that nobody else sees."""

    def __init__(self, job: Job) -> None:
        changed = {name: value for name, value in job.environment.items() if value is not None}
        kept = {name: value for name, value in os.environ.items() if name not in job.environment}
        self.name = job.name
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self.shown = 0
        self.started = time.monotonic()
        self.seconds = 0.0
        parent = os.getpid()
        libc = ctypes.CDLL(None)

        def end_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        self.process = subprocess.Popen(
            job.command,
            env={**kept, **changed},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for us, who pass it on
            preexec_fn=end_with_parent,  # noqa: PLW1509  (two system calls, no lock)
        )

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self.started
        return True

    def show(self) -> None:
        """Pass on what it has written since the last time."""
        while data := os.pread(self.log.fileno(), 1 << 16, self.shown):
            self.shown += len(data)
            sys.stdout.buffer.write(data)
        sys.stdout.flush()

    def signal(self, number: int) -> None:
        # Its children too: they are in its group unless they chose not to be.
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Wait until it has ended by SIGINT, which it got; be firmer if it has not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.signal(number)
        self.process.wait()
        self.log.close()


def run(jobs: Sequence[Job], processors: int = 1, interval: float = 0.2) -> list[int]:
    """Run `jobs`, each on as many `processors`, and return their exit statuses.

    They start in their order. However this function is left, none of them runs any more.

    Raises:
        KeyboardInterrupt: they were interrupted.
    """
    at_once = max(1, len(os.sched_getaffinity(0)) // processors)
    running: list[_Running] = []

    def start_more() -> None:
        while len(running) < len(jobs) and sum(not one.ended() for one in running) < at_once:
            job = jobs[len(running)]
            if job.after and any(one.name == job.after and not one.ended() for one in running):
                break
            running.append(_Running(job))

    try:
        for number, job in enumerate(jobs):
            start_more()
            print(f"==== {job.name}", flush=True)
            shown = running[number]
            while not shown.ended():
                shown.show()
                start_more()
                time.sleep(interval)
            shown.show()
            print(f"==== {job.name}: {_ending(shown)}", flush=True)
        return [one.process.returncode for one in running]
    finally:
        for one in running:
            one.signal(signal.SIGINT)
        for one in running:
            one.end()


def summary(jobs: Sequence[Job], statuses: Sequence[int]) -> int:
    """Name the jobs that failed; return the exit status for them all."""
    failed = [job.name for job, status in zip(jobs, statuses, strict=True) if status]
    if failed:
        print(f"==== FAILED: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def end_on_signals() -> None:
    """Let what ends this process do so as an exception, so that no job is left."""
    exit_on_signals()
    # A shell without job control starts what it runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _ending(one: _Running) -> str:
    status = one.process.returncode
    return f"{'well' if not status else f'exit status {status}'}, {one.seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Run commands side by side and show their outputs in turn."
    )
    parser.add_argument(
        "--processors", type=int, default=1, metavar="N", help="that each command keeps busy"
    )
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="a command line each")
    options = parser.parse_args(arguments)
    end_on_signals()
    jobs = [Job(command, shlex.split(command)) for command in options.commands]
    try:
        return summary(jobs, run(jobs, options.processors))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
