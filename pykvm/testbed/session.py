"""Run a command on the emulated host as if it were a local one."""

import os
import select
import shlex
import shutil
import sys
import tarfile
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pykvm import cache
from pykvm.cache import pruning as cache_pruning
from pykvm.cache import scratch
from pykvm.errors import PykvmError
from pykvm.host.checkout import commit
from pykvm.kernel.series import newest_kernel
from pykvm.testbed import payload, saved_state
from pykvm.testbed.bochs import DEFAULT_CPU, Emulator, Machine
from pykvm.testbed.folder import carried_files, current_folder, require_place

__all__ = ["CancelledError", "CommandTimeoutError", "HostDiedError", "Outcome", "Testbed"]

Sink = Callable[[bytes], None]

# From the start of the emulator to the start of the command, in seconds. It takes two or three.
_RESUME_TIMEOUT = 120.0

_END_OF_TRANSMISSION = b"\x04"  # Ctrl-D


class HostDiedError(PykvmError):
    """The emulator or the kernel in it ended before the command did."""


class CommandTimeoutError(PykvmError):
    """The command did not end in the time it was given."""


class CancelledError(PykvmError):
    """Another thread said that the command is to end."""


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status; 128 plus the signal's number if a signal ended it.
        stdout, stderr: what it wrote, in bytes.
        brought: files that came back, as paths in the folder.
        first_output: seconds from the call to the first byte of output, or None.
        seconds: of the whole call.
    """

    status: int
    stdout: bytes = b""
    stderr: bytes = b""
    brought: list[Path] = field(default_factory=list)
    first_output: float | None = None
    seconds: float = 0.0


class Testbed:
    """The emulated Intel host for one folder; any number of commands can run at a time.

    Attributes:
        folder: what is carried inside.
    """

    # pytest would take it for a class of tests.
    __test__ = False

    def __init__(
        self,
        folder: Path | None = None,
        progress: Callable[[str], None] | None = None,
        *,
        series: str | None = None,
        cpu: str = DEFAULT_CPU,
    ) -> None:
        """For `folder` (default: pykvm's own checkout from inside it, else the current folder).

        `progress` is told what is being waited for, when it takes long (default: standard error).
        `series` is one of `pykvm.kernel.series.SERIES` (default: `default_series()`); of it,
        the newest kernel runs.
        `cpu` is one of `pykvm.testbed.bochs.CPUS`; what the installed Bochs does not emulate, a
        newer one does, which is fetched first if need be.

        Raises:
            SeriesUnknownError, KernelMissingError: see `pykvm.kernel.series.newest_kernel`.
            BochsMissingError, PackageError: see `pykvm.testbed.bochs_installation.knowing`.
            FolderMissingError, FolderPlaceError: see `pykvm.testbed.folder.require_place`.
        """
        self.folder = (folder or current_folder()).resolve()
        require_place(self.folder)
        self._progress = progress or _Narrator()
        self.kernel = newest_kernel(series)
        self.machine = Machine.with_cpu(cpu)

    def prepare(
        self, kvm: str = "payload", modules: Path | None = None, also: Sequence[Path] = ()
    ) -> Path:
        """Make sure that the booted host with its KVM is in the cache; return its entry.

        The arguments are those of `run`.

        Raises:
            PykvmError: it cannot be made; the message says why.
        """
        cache_pruning.prune_daily()
        if kvm == "none":
            return saved_state.booted_host(self.kernel, self.machine, self._progress)
        if kvm == "payload" and modules is None:
            modules = self._built_modules(also)
        return saved_state.host_with_kvm(
            self.kernel, self.machine, modules if kvm == "payload" else None, self._progress
        )

    def run(
        self,
        command: Sequence[str],
        *,
        modules: Path | None = None,
        also: Sequence[Path] = (),
        kvm: str = "payload",
        timeout: float | None = None,
        environment: Mapping[str, str] | None = None,
        bring: Sequence[str] = (),
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        stdin: bytes = b"",
        interactive: bool = False,
        directory: Path | None = None,
        cancelled: threading.Event | None = None,
    ) -> Outcome:
        """Run `command` in the folder on the emulated host.

        Files that it writes below `build/` appear in the folder, and so do the paths in
        `bring`, which are relative to the folder.

        Args:
            modules: directory with kvm.ko and kvm-intel.ko to load; by default the patched ones,
                built if need be.
            also: patches to build them with besides the series' own, for tests that take a
                defence away.
            kvm: "payload" to load `modules`, "stock" for the distribution's, "none" for no KVM.
            timeout: seconds for the command, resuming not included.
            environment: variables to set.
            stdout, stderr: called with output as it comes; it is collected in any case.
            stdin: what the command reads from its standard input.
            interactive: give the command a terminal, connected to ours.
            directory: where to run, in the folder (default: the folder).
            cancelled: ends the run soon after another thread has set it.

        Raises:
            CommandTimeoutError: see `timeout`.
            CancelledError: see `cancelled`.
            HostDiedError: the emulator or the kernel inside died; the message names the logs.
            FolderTooLargeError, FolderNameError: see `pykvm.testbed.folder.carried_files`.
            PykvmError: what is needed is missing; the message says what to type.
        """
        start = time.monotonic()
        carried_files(self.folder)  # too many are refused before anything is booted
        job = payload.Job(
            "run",
            command=list(command),
            folder=str(self.folder),
            directory=str((directory or self.folder).resolve()),
            kvm=kvm,
            # There is no git inside to ask for the commit that records name.
            environment={"PYKVM_COMMIT": commit(), **(environment or {})},
            bring=["build", *(self._in_folder(name) for name in bring)],
            interactive=interactive,
            size=_terminal_size(),
            now=int(time.time()),
            python=payload.place_of_pykvm(self.folder),
            scripts=payload.scripts_directory(),
        )
        if kvm == "payload" and modules is None:
            modules = self._built_modules(also)
        host = self.prepare(kvm, modules)
        with scratch.directory("testbed-instances") as instance:
            image = instance / "files.iso"
            # They are loaded already; `pykvm kernel load` inside may want them again.
            payload.write(image, job, modules if kvm == "payload" else None, stdin)
            saved_state.lay_out(instance, host, image)
            try:
                with Emulator(instance, self.machine, host / "state") as emulator:
                    run = _Run(emulator, start, timeout, stdout, stderr, interactive, cancelled)
                    status, size = run.until_exit()
                outcome = run.outcome
                outcome.status = status
                outcome.brought = self._take_back(instance / "out.img", size)
            except (HostDiedError, CommandTimeoutError) as error:
                kept = _keep_logs(instance)
                raise type(error)(f"{error.problem} (logs: {kept})", error.next_step) from error
        outcome.seconds = time.monotonic() - start
        return outcome

    def plan(
        self,
        command: Sequence[str],
        *,
        kvm: str = "payload",
        modules: Path | None = None,
        also: Sequence[Path] = (),
    ) -> list[str]:
        """What `run` would do, a line each."""
        key = saved_state.host_key(self.kernel, self.machine)
        cached = (cache.root() / "testbed-host" / key).is_dir()
        patched = "the patched KVM" + "".join(f" with {patch}" for patch in also)
        loaded = {"payload": str(modules or patched), "stock": "the distribution's KVM"}
        files = len(carried_files(self.folder))
        return [
            f"kernel:   Linux {self.kernel.release} (series {self.kernel.series})",
            f"host:     {key}, {'in the cache' if cached else 'to be booted first'}",
            f"emulator: {' '.join(self.machine.command(Path('STATE')))}",
            f"modules:  {loaded.get(kvm, 'no KVM')}",
            f"folder:   {self.folder}, {files} files",
            f"command:  {shlex.join(command)}",
        ]

    def _built_modules(self, also: Sequence[Path]) -> Path:
        # Imported late: with stock or other modules nothing of it is needed.
        from pykvm.kernel import build as kernel  # noqa: PLC0415

        return kernel.build(self.kernel.release, also=also)

    def _in_folder(self, name: str) -> str:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise payload.PayloadError(f"{name} is outside {self.folder}", "name a path inside it")
        return str(path.relative_to(self.folder))

    def _take_back(self, disk: Path, size: int) -> list[Path]:
        if not size:
            return []
        with disk.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            # Debian 12's Python has no extraction filters yet. There are files and links only.
            members = [member for member in archive if member.isreg() or member.issym()]
            for member in members:
                self._in_folder(member.name)
                if member.issym():
                    self._in_folder(str(Path(member.name).parent / member.linkname))
                archive.extract(member, self.folder)
            return [self.folder / member.name for member in members]


class _Run:
    """The conversation with the emulator during one command."""

    def __init__(
        self,
        emulator: Emulator,
        start: float,
        timeout: float | None,
        stdout: Sink | None,
        stderr: Sink | None,
        interactive: bool,
        cancelled: threading.Event | None,
    ) -> None:
        self.outcome = Outcome(status=-1)
        self._cancelled = cancelled
        self._emulator = emulator
        self._start = start
        self._timeout = timeout
        self._sinks = {emulator.stdout: stdout, emulator.stderr: stderr}
        self._interactive = interactive
        self._control = b""
        self._started: float | None = None

    def until_exit(self) -> tuple[int, int]:
        """Stream until the job reports its end: exit status and size of what comes back."""
        emulator = self._emulator
        emulator.say_go()
        resumed = time.monotonic()
        with _raw_terminal(self._interactive) as keyboard:
            sources = [emulator.control, emulator.stdout, emulator.stderr]
            while True:
                listening = sources if self._started is None else [*sources, *keyboard]
                readable, _, _ = select.select(listening, [], [], 0.25)
                for source in readable:
                    if source in keyboard:
                        data = os.read(source, 256)
                        if not data:  # the end of a file is a key too
                            keyboard.remove(source)
                        os.write(emulator.control, data or _END_OF_TRANSMISSION)
                    elif source == emulator.control:
                        self._control += os.read(source, 4096)
                    else:
                        self._output(source, os.read(source, 65536))
                if end := self._reports():
                    self._drain()
                    return end
                if not readable:
                    self._check_alive()
                self._check_time(resumed)

    def _reports(self) -> tuple[int, int] | None:
        while b"\n" in self._control:
            line, _, self._control = self._control.partition(b"\n")
            word, *rest = line.decode(errors="replace").split(" ")
            if word == "started":
                self._started = time.monotonic()
            elif word == "failed":
                raise HostDiedError(f"the job could not be run: {' '.join(rest)}")
            elif word == "exit":
                return int(rest[0]), int(rest[1])
        return None

    def _output(self, source: int, data: bytes) -> None:
        outcome = self.outcome
        if outcome.first_output is None and data:
            outcome.first_output = time.monotonic() - self._start
        if source == self._emulator.stdout:
            outcome.stdout += data
        else:
            outcome.stderr += data
        sink = self._sinks[source]
        if sink is not None:
            sink(data)

    def _drain(self) -> None:
        for source in (self._emulator.stdout, self._emulator.stderr):
            while select.select([source], [], [], 0)[0]:
                self._output(source, os.read(source, 65536))

    def _check_alive(self) -> None:
        emulator = self._emulator
        if not emulator.running():
            self._drain()
            raise HostDiedError(f"the emulator died: {emulator.last_words()}")
        if "Kernel panic" in saved_state.tail(emulator.directory / "kernel.log"):
            self._drain()
            raise HostDiedError("the emulated kernel panicked")

    def _check_time(self, resumed: float) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise CancelledError("the command was cancelled")
        now = time.monotonic()
        if self._started is None:
            if now - resumed > _RESUME_TIMEOUT:
                raise HostDiedError(f"the emulated host did not resume in {_RESUME_TIMEOUT:.0f} s")
        elif self._timeout is not None and now - self._started > self._timeout:
            raise CommandTimeoutError(f"the command did not end in {self._timeout:g} s")


class _Narrator:
    """Tells on standard error what takes long, with the seconds so far."""

    def __init__(self) -> None:
        self._start: float | None = None

    def __call__(self, message: str) -> None:
        now = time.monotonic()
        self._start = self._start or now
        print(f"pykvm testbed: [{now - self._start:5.1f} s] {message}", file=sys.stderr, flush=True)


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[list[int]]:
    """Our own keyboard as a list of descriptors; empty unless `wanted` and a terminal."""
    if not wanted:
        yield []
        return
    descriptor = sys.stdin.fileno()
    if not os.isatty(descriptor):
        yield [descriptor]
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield [descriptor]
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _terminal_size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.lines, size.columns


def _keep_logs(instance: Path) -> Path:
    kept = cache.log_path(f"testbed-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    saved_state.collect_logs(instance, kept)
    return kept
