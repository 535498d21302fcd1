"""The emulator process: its configuration, and starting it so that nothing outlives us.

Bochs runs in a network namespace of its own, because its RFB display listens on every address
without a password, and in a process namespace of its own, whose end takes every process in it
along. The chain of parent-death signals from us to the first process there covers the case that
we are killed and cannot clean up.
"""

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
from pykvm.testbed import bochs_installation, requirements
from pykvm.testbed.bochs_installation import Installation

__all__ = [
    "CLOCK",
    "CPUS",
    "DEFAULT_CPU",
    "MEMORY",
    "Emulator",
    "EmulatorError",
    "Machine",
    "make_restorable",
]

# Bytes. A resume copies all of it, in pages of 4 KiB: 1 GiB would take twice as long.
MEMORY = 512 << 20

# Emulated instructions in a second of emulated time. It sets how often the guest's timer ticks:
# 250 times in that many instructions.
CLOCK = 45_000_000


@dataclass(frozen=True)
class Cpu:
    """One processor that the emulated host can have.

    Attributes:
        options: of Bochs's `cpu` line, besides the model.
        levels: of the host's own paging.
        exact: whether every instruction advances the time stamp counter by one, so that counts
            mean something. A Bochs that can do without is 2.7 times faster then.
    """

    options: str = ""
    levels: int = 4
    exact: bool = True


# By the names that Bochs has for them.
CPUS = {
    "corei7_skylake_x": Cpu(),
    # Linux takes AMX for usable with XFD alone, which Bochs has not, and turns half of it on. And
    # Bochs enters no guest whose levels of paging are not the host's.
    "sapphire_rapids": Cpu('exclude_features="amx,amx_int8,amx_bf16"', levels=5, exact=False),
}
DEFAULT_CPU = "corei7_skylake_x"

_PR_SET_PDEATHSIG = 1

_CONFIGURATION = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model={cpu}, count=1, ips={clock}, reset_on_triple_fault=0
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
        bochs: the Bochs.
    """

    cpu: str
    bochs: Installation

    @classmethod
    def with_cpu(cls, cpu: str) -> "Machine":
        """The machine with the processor `cpu`.

        Raises:
            BochsMissingError, PackageError: see `bochs_installation.knowing`.
        """
        return cls(cpu, bochs_installation.knowing(cpu))

    def configuration(self) -> str:
        """The bochsrc. Paths in it are of the firmware, or in the directory of the instance."""
        options = CPUS[self.cpu].options
        return _CONFIGURATION.format(
            cpu=f"{self.cpu}, {options}" if options else self.cpu,
            clock=CLOCK,
            memory=MEMORY >> 20,
            share=self.bochs.share,
        )

    def command(self, restore: Path | None) -> list[str]:
        """What runs Bochs in namespaces of its own, from the saved state in `restore` if given."""
        unshare = ["unshare", "--net", "--pid", "--fork", "--kill-child=KILL"]
        if os.geteuid() != 0:
            unshare.append("--map-root-user")
        command = [*unshare, *self.bochs.command, "-q", "-f", "bochsrc"]
        command += self.bochs.debugger_options() if CPUS[self.cpu].exact else []
        return command if restore is None else [*command, "-r", str(restore)]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def make_restorable(state: Path) -> None:
    """Mend the configuration that Bochs wrote beside the saved state in the directory `state`.

    Bochs tells timers apart by the order in which the devices made them. The USB controller is
    loaded last in a fresh start; but the saved configuration names it among the optional
    plug-ins, which come first. Every later device's timers, the serial ports' among them, would
    then be taken for its neighbour's.
    """
    config = state / "config"
    text = config.read_text().replace(" usb_uhci=true,", "")
    config.write_text(re.sub(r"^usb_uhci:.*\n?", "", text, flags=re.MULTILINE))


class Emulator(Closeable):
    """A running Bochs in `directory`, which holds all that its configuration names.

    Attributes:
        directory: where it runs.
        control: descriptor of the control channel (the guest's second serial port).
        stdout: descriptor to read what the guest writes to its first serial port.
        stderr: the same for the fourth.
    """

    def __init__(self, directory: Path, machine: Machine, restore: Path | None = None) -> None:
        """Start it; from the saved state in `restore`, if given, else from power-on.

        Raises:
            EmulatorError: a program is missing, or namespaces are not permitted.
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
                start_new_session=True,  # a terminal's Ctrl-C is for us alone
                preexec_fn=die_with_parent,  # noqa: PLW1509  (two system calls, no lock)
            )

    def wait(self, timeout: float) -> None:
        """Wait until the emulator has ended by itself, at most `timeout` seconds.

        Raises:
            EmulatorError: it still runs.
        """
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"the emulator did not end ({self.last_words()})") from error

    def say_go(self) -> None:
        """Let the agent inside go on, on the control channel.

        The line is there before the machine goes on, so that it always arrives at the same
        instruction: Bochs opens the terminal long before it has read its state, and sets it up
        in a way that shows.
        """
        deadline = time.monotonic() + _OPEN_TIMEOUT
        while self.running() and not self._opened() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.write(self.control, b"go\n")

    def _opened(self) -> bool:
        local_modes: int = termios.tcgetattr(self.control)[3]
        return local_modes & termios.ECHO == 0

    def running(self) -> bool:
        """Whether the emulator still runs."""
        return self._process is not None and self._process.poll() is None

    def inner_pid(self) -> int:
        """The process in the namespaces.

        Raises:
            EmulatorError: there is none (yet).
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
        """Return the seconds of this host's processors that the emulator has used."""
        try:
            # proc(5): the name, in parentheses, may hold anything; 14 and 15 are utime and stime.
            fields = Path(f"/proc/{self.inner_pid()}/stat").read_text().rpartition(")")[2].split()
        except (OSError, EmulatorError):  # not started yet, or ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_words(self) -> str:
        """What the emulator said last, in one line."""
        if "unshare failed" in _text(self.directory / "bochs.out"):
            return "it may not make namespaces"
        for name in ("bochs.log", "bochs.out"):
            lines = [line.strip() for line in _text(self.directory / name).splitlines()]
            told = [line for line in lines if ">>PANIC<<" in line or "cannot" in line.lower()]
            if told:
                return told[-1]
        return "it left no message"

    def close(self) -> None:
        """End the emulator at once and wait until it is gone; a forked process lets it run."""
        if self._process is not None and not self.inherited:
            if self._process.poll() is None:
                self._process.kill()  # unshare's child dies with it, and all of its namespace
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _terminal(self, name: str) -> int:
        # The one kind of serial port that both sides can use and that crosses namespaces.
        outside, inside = pty.openpty()
        self._descriptors += [outside, inside]
        (self.directory / name).symlink_to(os.ttyname(inside))
        return outside

    def _fifo(self, name: str) -> int:
        # A FIFO, since a pseudo-terminal whose buffer is full would lose bytes. Both ends are
        # held open, so that neither side waits for the other or sees an end of file.
        path = self.directory / name
        os.mkfifo(path)
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        return descriptor
