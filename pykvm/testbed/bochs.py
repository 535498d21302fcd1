"""The emulator process: its configuration, its start and its end.

Bochs runs in a network namespace of its own, because its RFB display listens on every address
without a password. It also runs in a PID namespace of its own, because the end of that namespace
kills every process in it. If this process is killed and cannot clean up, a chain of parent-death
signals reaches the first process of the namespace (PR_SET_PDEATHSIG, prctl(2)).
"""

import contextlib
import ctypes
import os
import pty
import re
import signal
import subprocess
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.host.commands import program
from pykvm.host.debian_packages import PackageError
from pykvm.testbed import bochs_installation, requirements
from pykvm.testbed.bochs_installation import Installation

__all__ = [
    "CLOCK",
    "CPUS",
    "DEFAULT_CPU",
    "MEMORIES",
    "MEMORY",
    "MOST_CPUS",
    "Emulator",
    "EmulatorError",
    "Machine",
    "make_restorable",
]

# MiB. A resume copies all of them, in pages of 4 KiB, so 1 GiB would take twice as long.
MEMORY = 512
MEMORIES = (512, 1024, 2048)

# Instructions in a second of emulated time. The guest's timer ticks 250 times in that many.
CLOCK = 45_000_000


@dataclass(frozen=True)
class Cpu:
    """One processor that the emulated host can have.

    Attributes:
        options: options of Bochs's `cpu` line in addition to the model.
        levels: levels of the host's own paging.
        exact: whether instructions are ever counted exactly with it (see `Machine`).
        kvm_intel: parameters with which kvm-intel.ko is loaded.
    """

    options: str = ""
    levels: int = 4
    exact: bool = True
    kvm_intel: str = ""


# By Bochs's names of the models.
CPUS = {
    # Bochs 2.7 has no APICv. 3.0 enters a guest with it only if KVM's descriptor of posted
    # interrupts happens to start a page; 64 bytes of alignment are enough (SDM vol. 3C, 26.2.1.1).
    "corei7_skylake_x": Cpu(kvm_intel="enable_apicv=0"),
    # Linux uses AMX only with XFD, which Bochs lacks, and turns half of AMX on. Bochs enters no
    # guest that has fewer or more levels of paging than the host.
    "sapphire_rapids": Cpu('exclude_features="amx,amx_int8,amx_bf16"', levels=5, exact=False),
}
DEFAULT_CPU = "corei7_skylake_x"
MOST_CPUS = 4  # each more takes its share of one processor of this host

_PR_SET_PDEATHSIG = 1

_CONFIGURATION = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model={cpu}, count={cpus}, ips={clock}, reset_on_triple_fault=0
memory: guest={memory}, host={memory}
romimage: file={share}/BIOS-bochs-latest
vgaromimage: file={share}/VGABIOS-lgpl-latest
pci: enabled=1, chipset=i440fx
clock: sync=none, time0=utc
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=boot.img, mode=volatile
ata0-slave: type=disk, path=root.img, mode=volatile
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=cdrom, path=payload.iso, status=inserted
ata1-slave: type=disk, path=out.img, mode=flat
boot: disk
com1: enabled=1, mode=file, dev=stdout
com2: enabled=1, mode=term, dev=control
com3: enabled=1, mode=file, dev=kernel.log
com4: enabled=1, mode=file, dev=stderr
mouse: enabled=0
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""

_OPEN_TIMEOUT = 20.0  # seconds


class EmulatorError(PykvmError):
    """The emulator cannot be started, or died."""


@dataclass(frozen=True)
class Machine:
    """An emulated processor, and the Bochs that emulates it.

    Attributes:
        cpu: one of `CPUS`.
        bochs: the installation of Bochs to start.
        exact: whether every instruction advances the time-stamp counter by one, so that counts
            of instructions are exact. Without that, Bochs leaves its debugger off and runs up to
            twice as fast; RDTSC then returns the count of an earlier instruction.
        cpus: how many of the processor there are. Bochs runs several in turn, each for some
            instructions, and so counts none exactly.
        memory: MiB of RAM, one of `MEMORIES`.
    """

    cpu: str
    bochs: Installation
    exact: bool = True
    cpus: int = 1
    memory: int = MEMORY

    @classmethod
    def with_cpu(
        cls, cpu: str, *, fast: bool = False, cpus: int = 1, memory: int = MEMORY
    ) -> "Machine":
        """Return the machine with the processor `cpu`.

        Args:
            cpu: one of `CPUS`.
            fast: whether speed matters more than exact counts; always with several processors.
            cpus: processors, 1 to `MOST_CPUS`.
            memory: MiB of RAM, one of `MEMORIES`.

        Raises:
            BochsMissingError, PackageError: see `bochs_installation.knowing`.
        """
        exact = CPUS[cpu].exact and cpus == 1
        if CPUS[cpu].exact and (fast or not exact):
            # Without such a Bochs, a slower one does as well.
            with contextlib.suppress(PackageError):
                undebugged = bochs_installation.knowing(cpu, undebugged=True)
                return cls(cpu, undebugged, exact=False, cpus=cpus, memory=memory)
        return cls(cpu, bochs_installation.knowing(cpu), exact, cpus, memory)

    def __str__(self) -> str:
        return f"a {self.cpu}" if self.cpus == 1 else f"{self.cpus} {self.cpu}"

    def configuration(self) -> str:
        """Return the text of the bochsrc.

        The firmware's paths are those of the installation; other paths are relative to the
        directory of the instance.
        """
        options = CPUS[self.cpu].options
        return _CONFIGURATION.format(
            cpu=f"{self.cpu}, {options}" if options else self.cpu,
            cpus=self.cpus,
            clock=CLOCK,
            memory=self.memory,
            share=self.bochs.share,
        )

    def command(self, restore: Path | None) -> list[str]:
        """Return the command that runs Bochs in its own namespaces.

        Args:
            restore: directory of a saved state to resume; None to start from power-on.
        """
        unshare = ["unshare", "--net", "--pid", "--fork", "--kill-child=KILL"]
        if os.geteuid() != 0:
            unshare.append("--map-root-user")
        command = [*unshare, *self.bochs.command, "-q", "-f", "bochsrc"]
        command += self.bochs.debugger_options() if self.exact else []
        return command if restore is None else [*command, "-r", str(restore)]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def make_restorable(state: Path) -> None:
    """Repair the configuration that Bochs saved in the directory `state`, so that it can resume.

    Bochs identifies timers by the order in which the devices create them. A fresh start loads the
    USB controller last, but the saved configuration lists it among the optional plug-ins, which
    are loaded first. Each later device would then use the timers of its neighbour; the serial
    ports are among these devices.
    """
    config = state / "config"
    text = config.read_text().replace(" usb_uhci=true,", "")
    config.write_text(re.sub(r"^usb_uhci:.*\n?", "", text, flags=re.MULTILINE))


class Emulator(Closeable):
    """A running Bochs.

    Attributes:
        directory: directory in which it runs; holds the files that its configuration names.
        control: descriptor of the control channel (the guest's second serial port).
        stdout: descriptor to read the output of the guest's first serial port.
        stderr: descriptor to read the output of the guest's fourth serial port.
    """

    def __init__(self, directory: Path, machine: Machine, restore: Path | None = None) -> None:
        """Start Bochs.

        Args:
            directory: see the attribute.
            machine: the processor, and the Bochs that emulates it.
            restore: directory of a saved state to resume; None to start from power-on.

        Raises:
            RequirementsError: a program or file is missing.
        """
        requirements.require()
        self.directory = directory
        self._descriptors: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.control = self._terminal("control")
            self.stdout = self._fifo("stdout")
            self.stderr = self._fifo("stderr")
            if machine.bochs.root is not None:
                (directory / "usr").symlink_to(machine.bochs.root / "usr")
            if restore is not None:
                (directory / "restored").symlink_to(restore)
                restore = Path("restored")
            (directory / "bochsrc").write_text(machine.configuration())
            # Bochs 2.7 starts its debugger, which waits at its prompt unless told to continue.
            (directory / "debugger").write_text("c\n")
            self._process = self._start(machine, restore)
        except BaseException:
            self.close()
            raise

    def _start(self, machine: Machine, restore: Path | None) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with (self.directory / "bochs.out").open("wb") as output:
            return subprocess.Popen(
                machine.command(restore),
                cwd=self.directory,
                env={**os.environ, **machine.bochs.environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
                preexec_fn=die_with_parent,  # noqa: PLW1509  (two system calls, no lock)
            )

    def wait(self, timeout: float) -> None:
        """Wait until the emulator has ended by itself.

        Args:
            timeout: seconds to wait at most.

        Raises:
            EmulatorError: the emulator still runs.
        """
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"the emulator did not end ({self.last_words()})") from error

    def say_go(self) -> None:
        """Tell the agent inside to continue, over the control channel.

        The line is written before the machine resumes, so it always arrives at the same
        instruction. Bochs opens the terminal long before it has read the saved state, and turns
        the terminal's echo off, which can be seen here.
        """
        deadline = time.monotonic() + _OPEN_TIMEOUT
        while self.running() and not self._opened() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.write(self.control, b"go\n")

    def _opened(self) -> bool:
        local_modes: int = termios.tcgetattr(self.control)[3]
        return local_modes & termios.ECHO == 0

    def running(self) -> bool:
        """Return whether the emulator still runs."""
        return self._process is not None and self._process.poll() is None

    def inner_pid(self) -> int:
        """Return the PID of the first process in the namespaces.

        Raises:
            EmulatorError: there is no such process, or not yet.
        """
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        try:
            return int(children.read_text().split()[0])
        except (OSError, IndexError) as error:
            raise EmulatorError(
                f"the emulator did not start ({self.last_words()})", f"{program()} doctor"
            ) from error

    def processor_time(self) -> float:
        """Return the processor time that the emulator has used, in seconds; 0 if it has ended."""
        try:
            # proc(5): the name, in parentheses, may hold any character; fields 14 and 15 are
            # utime and stime.
            fields = Path(f"/proc/{self.inner_pid()}/stat").read_text().rpartition(")")[2].split()
        except (OSError, EmulatorError):  # not started yet, or ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_words(self) -> str:
        """Return the emulator's last error message, in one line."""
        if "unshare failed" in _text(self.directory / "bochs.out"):
            return "it may not make namespaces"
        for name in ("bochs.log", "bochs.out"):
            lines = [line.strip() for line in _text(self.directory / name).splitlines()]
            told = [line for line in lines if ">>PANIC<<" in line or "cannot" in line.lower()]
            if told:
                return told[-1]
        return "it left no message"

    def close(self) -> None:
        """Kill the emulator and wait until it is gone.

        In a process that was forked meanwhile, only close the descriptors.
        """
        if self._process is not None and not self.inherited:
            if self._process.poll() is None:
                self._process.kill()  # kills unshare's child too, and with it the namespace
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _terminal(self, name: str) -> int:
        # Of Bochs's serial ports, only this kind works in both directions across namespaces.
        outside, inside = pty.openpty()
        self._descriptors += [outside, inside]
        (self.directory / name).symlink_to(os.ttyname(inside))
        return outside

    def _fifo(self, name: str) -> int:
        # A pseudo-terminal would lose bytes when its buffer is full. Both ends of the FIFO are
        # open here, so that neither side waits for the other or sees an end of file.
        path = self.directory / name
        os.mkfifo(path)
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        return descriptor
