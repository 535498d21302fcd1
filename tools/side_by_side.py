"""Run commands side by side, as many as there are processors, and show their outputs in turn.

    python -m tools.side_by_side [--processors N] "COMMAND" ...

The first command's output is shown as it arrives. Each other's output is shown, from its start,
once the commands before it have ended. Ctrl-C interrupts all commands, and this process waits until
they have ended. The exit status is 1 if any of them failed.
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

_PATIENCE: Final = 20.0  # seconds between SIGINT, SIGTERM and SIGKILL
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Job:
    """A command and its name.

    Attributes:
        name: name of the job, for its heading.
        command: program and arguments.
        environment: variables to set, or to unset if the value is None.
        after: name of an earlier job that must have ended, well or not, before this one starts.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    after: str = ""


class _Running:
    """A job that was started; its output goes to an unnamed temporary file."""

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
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which passes it on
            preexec_fn=end_with_parent,  # noqa: PLW1509  (two system calls, no lock)
        )

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self.started
        return True

    def show(self) -> None:
        """Print the output that it has written since the last call."""
        while data := os.pread(self.log.fileno(), 1 << 16, self.shown):
            self.shown += len(data)
            sys.stdout.buffer.write(data)
        sys.stdout.flush()

    def signal(self, number: int) -> None:
        # The children are in its process group too, unless they have left it.
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Wait until it has ended after SIGINT; send SIGTERM and SIGKILL if it does not end."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.signal(number)
        self.process.wait()
        self.log.close()


def run(jobs: Sequence[Job], processors: int = 1, interval: float = 0.2) -> list[int]:
    """Run jobs, which start in their order, and return their exit statuses.

    When the function returns or raises, no job runs any more.

    Args:
        jobs: the jobs.
        processors: number of processors that each job keeps busy.
        interval: seconds between two checks for output.

    Raises:
        KeyboardInterrupt: the jobs were interrupted.
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
                for one in running[number + 1 :]:
                    one.ended()  # notes how long it took
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
    """Print the names of the jobs that failed; return the exit status for all jobs."""
    failed = [job.name for job, status in zip(jobs, statuses, strict=True) if status]
    if failed:
        print(f"==== FAILED: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def end_on_signals() -> None:
    """Let the signals that end this process raise an exception, so that all jobs are ended."""
    exit_on_signals()
    # A shell without job control starts background commands with SIGINT ignored.
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
