"""Commands on the emulated host, run as if they were local."""

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
from pykvm.testbed.bochs import DEFAULT_CPU, MEMORY, Emulator, Machine
from pykvm.testbed.folder import carried_files, current_folder, require_place

__all__ = ["CancelledError", "CommandTimeoutError", "HostDiedError", "Outcome", "Testbed"]

Sink = Callable[[bytes], None]

# Seconds from the start of the emulator to the start of the command. It usually takes two or three.
_RESUME_TIMEOUT = 120.0

_END_OF_TRANSMISSION = b"\x04"  # Ctrl-D


class HostDiedError(PykvmError):
    """The emulator or the kernel in it ended before the command did."""


class CommandTimeoutError(PykvmError):
    """The command did not end within its timeout."""


class CancelledError(PykvmError):
    """Another thread cancelled the command."""


@dataclass
class Outcome:
    """Result of a command.

    Attributes:
        status: exit status; 128 plus the signal's number if a signal ended it.
        stdout, stderr: its output.
        brought: files that were brought back, as paths in the folder.
        first_output: seconds from the call to the first byte of output; None without output.
        seconds: seconds of the whole call.
    """

    status: int
    stdout: bytes = b""
    stderr: bytes = b""
    brought: list[Path] = field(default_factory=list)
    first_output: float | None = None
    seconds: float = 0.0


class Testbed:
    """The emulated Intel host for one folder. Any number of commands may run at the same time.

    Attributes:
        folder: the folder that is carried inside.
        kernel: kernel of the host.
        machine: processor of the host, and the Bochs that emulates it.
    """

    # pytest would collect it as a class of tests.
    __test__ = False

    def __init__(
        self,
        folder: Path | None = None,
        progress: Callable[[str], None] | None = None,
        *,
        series: str | None = None,
        cpu: str = DEFAULT_CPU,
        fast: bool = False,
        cpus: int = 1,
        memory: int = MEMORY,
    ) -> None:
        """Choose the folder, the kernel and the processor; start nothing.

        Args:
            folder: the folder to carry inside. By default it is pykvm's own checkout if the current
                folder is in it, else the current folder.
            progress: called with a message at each step that takes long; by default the messages
                go to standard error.
            series: kernel series, one of `pykvm.kernel.series.SERIES`, of which the newest kernel
                is used; by default that of `default_series()`.
            cpu: emulated processor, one of `pykvm.testbed.bochs.CPUS`. If the installed Bochs does
                not emulate it, a newer Bochs is fetched.
            fast: whether speed matters more than exact counts (`Machine.exact`).
            cpus: emulated processors, 1 to `pykvm.testbed.bochs.MOST_CPUS`; with more than one,
                counts are not exact.
            memory: MiB of RAM, one of `pykvm.testbed.bochs.MEMORIES`.

        Raises:
            SeriesUnknownError, KernelMissingError: see `pykvm.kernel.series.newest_kernel`.
            BochsMissingError, PackageError: see `pykvm.testbed.bochs_installation.knowing`.
            FolderMissingError, FolderPlaceError: see `pykvm.testbed.folder.require_place`.
        """
        self.folder = (folder or current_folder()).resolve()
        require_place(self.folder)
        self._progress = progress or _Narrator()
        self.kernel = newest_kernel(series)
        self.machine = Machine.with_cpu(cpu, fast=fast, cpus=cpus, memory=memory)

    def prepare(
        self, kvm: str = "payload", modules: Path | None = None, also: Sequence[Path] = ()
    ) -> Path:
        """Boot the host with its KVM if the cache lacks it; return its cache entry.

        The arguments are those of `run`.

        Raises:
            PykvmError: the host cannot be prepared; the message says why.
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

        Files that the command writes below `build/`, and the paths in `bring`, are copied back to
        the folder.

        Args:
            command: program and arguments.
            modules: directory of kvm.ko and kvm-intel.ko to load; by default the patched modules,
                which are built if the cache lacks them.
            also: further patches to build the patched modules with, for tests that remove a
                defence.
            kvm: "payload" to load `modules`, "stock" for the distribution's KVM, "none" for no KVM.
            timeout: seconds for the command, without the time to resume the host.
            environment: environment variables to set.
            bring: further paths to copy back, relative to the folder.
            stdout, stderr: called with output as it arrives. `Outcome` holds all output in any
                case.
            stdin: content of the command's standard input.
            interactive: whether to give the command a terminal that is connected to this process's.
            directory: working directory of the command, in the folder; by default the folder.
            cancelled: event with which another thread ends the run.

        Raises:
            CommandTimeoutError: the command did not end within `timeout`.
            CancelledError: another thread set `cancelled`.
            HostDiedError: the emulator or the kernel inside died; the message names the logs.
            FolderTooLargeError, FolderNameError: see `pykvm.testbed.folder.carried_files`.
            PykvmError: something is missing; the message says what to type.
        """
        start = time.monotonic()
        carried_files(self.folder)  # raises before the host is booted
        job = payload.Job(
            "run",
            command=list(command),
            folder=str(self.folder),
            directory=str((directory or self.folder).resolve()),
            kvm=kvm,
            exact=self.machine.exact,
            # Records name the commit, and the emulated host has no git to find it.
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
            # The modules are loaded already; `pykvm kernel load` inside may need their files.
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
        """Return what `run` would do, line by line; the arguments are those of `run`."""
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
        # Imported late, because it is only needed for the patched modules.
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
            # Debian 12's Python has no extraction filters yet, so members are filtered here:
            # files and links only.
            members = [member for member in archive if member.isreg() or member.issym()]
            for member in members:
                self._in_folder(member.name)
                if member.issym():
                    self._in_folder(str(Path(member.name).parent / member.linkname))
                archive.extract(member, self.folder)
            return [self.folder / member.name for member in members]


class _Run:
    """Exchange with the emulator during one command."""

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
        """Pass input and output on until the job reports its end.

        Returns:
            The exit status, and the size in bytes of the archive that is brought back.
        """
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
                        if not data:  # end of file: sent to the terminal inside as Ctrl-D
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
    """Progress messages on standard error, with the seconds since the first of them."""

    def __init__(self) -> None:
        self._start: float | None = None

    def __call__(self, message: str) -> None:
        now = time.monotonic()
        self._start = self._start or now
        print(f"pykvm testbed: [{now - self._start:5.1f} s] {message}", file=sys.stderr, flush=True)


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[list[int]]:
    """Switch this process's terminal to raw mode for the duration of the context.

    Yields:
        The descriptor of standard input in a list; an empty list unless `wanted`. If standard input
        is no terminal, its mode is not changed.
    """
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
