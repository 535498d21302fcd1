"""A Linux guest that runs one command: its initial RAM disks, and what its end means.

The first process, guest/linux/init.c, loads modules, mounts the root file system, runs the command
with three ports of a virtio console as its streams (or a console as its terminal), and writes how
that ended into a fourth port.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.machine.linux import cpio
from pykvm.machine.linux.guest_modules import modules_archive, release_of
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain.programs import build_program

if TYPE_CHECKING:
    from pykvm.network.addresses import StaticAddress

__all__ = [
    "STATUS_PORT",
    "STREAM_PORTS",
    "Command",
    "CommandError",
    "GuestFailedError",
    "exit_status",
    "shared_environment",
]

STREAM_PORTS: Final = ("stdin", "stdout", "stderr")
"""Names of the console's ports that are a command's streams."""

STATUS_PORT: Final = "status"
"""Name of the port that tells how the command ended."""

_MODULES: Final = ("virtio_pci", "virtio_console", "overlay")
_MODULES_OF: Final = {"virtiofs": ("virtiofs",), "ext4": ("virtio_blk", "ext4")}
_SHARED: Final = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TZ", "USER")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_WORDS: Final = 4096  # as in init.c
_MOST_BYTES: Final = 2 << 20  # of settings; less than init.c takes
_SIGNALLED: Final = 128  # a shell's status of a program that a signal has ended


class CommandError(PykvmError):
    """A command that cannot be handed to a guest."""


class GuestFailedError(PykvmError):
    """A guest that could not run its command, or ended without saying how the command did."""


def shared_environment() -> dict[str, str]:
    """Return the part of this process's environment that means the same in a guest."""
    found = {name: os.environ[name] for name in _SHARED if name in os.environ}
    return {"PATH": _PATH, "HOME": "/root", **found}


@dataclass(frozen=True)
class Command:
    """A command, and the system in which it runs.

    Attributes:
        words: program and arguments.
        root: type and source of the root file system: ``virtiofs:TAG`` or ``ext4:/dev/vda``.
        writable: whether what is written goes into the root file system itself; otherwise it goes
            into memory, and is gone with the guest.
        environment: the command's environment.
        directory: where it starts; ``/`` where there is no such directory.
        name: the guest's host name.
        terminal: whether its streams are a terminal, the console, instead of three ports.
        modules: names of further modules of the kernel.
        addresses: addresses of its network interfaces, in their order; None leaves one alone.
    """

    words: Sequence[str]
    root: str
    writable: bool = False
    environment: Mapping[str, str] = field(default_factory=shared_environment)
    directory: str = "/"
    name: str = "pykvm"
    terminal: bool = False
    modules: Sequence[str] = ()
    addresses: Sequence[StaticAddress | None] = ()

    def settings(self) -> bytes:
        """Return what guest/linux/init.c reads.

        Raises:
            CommandError: there is no command, or it is too long, or has a zero in it.
        """
        if not self.words or not self.words[0]:
            raise CommandError("an empty command", "name a program")
        pairs = [
            ("root", self.root),
            ("directory", self.directory),
            ("name", self.name),
            ("terminal", str(int(self.terminal))),
            *(("word", word) for word in self.words),
            *(("environment", f"{name}={text}") for name, text in self.environment.items()),
        ]
        pairs += [] if self.writable else [("overlay", "mode=755")]
        for index, address in enumerate(self.addresses):
            if address is not None:
                gateway = address.gateway or ""
                words = (f"eth{index}", address.address.ip, address.address.netmask, gateway)
                pairs.append(("interface", " ".join(map(str, words)).strip()))
                pairs += [("resolver", str(resolver)) for resolver in address.resolvers]
        lines = [os.fsencode(f"{key}={value}") for key, value in pairs]
        if any(b"\0" in line for line in lines):
            raise CommandError("a zero byte in the command or its environment", "leave it out")
        most = max(len(self.words), len(self.environment))
        if most > _MOST_WORDS or sum(map(len, lines)) > _MOST_BYTES:
            raise CommandError(
                f"a command of {len(self.words)} words and {sum(map(len, lines))} bytes",
                f"use at most {_MOST_WORDS} words and {_MOST_BYTES >> 20} MiB",
            )
        return b"".join(line + b"\0" for line in lines)

    def initrds(self, kernel: Path, directory: Path) -> tuple[Path, ...]:
        """Return the initial RAM disks for a kernel; that of the settings is put into `directory`.

        Raises:
            CommandError: see `settings`.
            KernelError: the kernel's release is unknown.
            ModuleFileError: this host lacks modules of the kernel.
            CompileError, CompilerMissingError: the first process cannot be compiled.
        """
        settings = directory / "settings.cpio"
        settings.write_bytes(cpio.archive(cpio.file("settings", self.settings(), 0o600)))
        names = [*_MODULES, *_MODULES_OF.get(self.root.split(":")[0], ()), *self.modules]
        return _first_process(), modules_archive(release_of(kernel), names), settings


def _first_process() -> Path:
    program = build_program("guest-program", GUEST_SOURCES / "linux" / "init.c")

    def make(directory: Path) -> None:
        archive = cpio.archive(
            cpio.directory("dev"),
            cpio.device("dev/console", 5, 1),
            cpio.file("init", program.read_bytes(), 0o755),
        )
        (directory / "init.cpio").write_bytes(archive)

    return cache.entry("guest-init", cache.key(program), make) / "init.cpio"


def exit_status(told: bytes) -> int:
    """Return the exit status of a command, as a shell would, from what its guest has told.

    Raises:
        GuestFailedError: it has told something else, or nothing.
    """
    words = told.decode(errors="replace").split()
    match words:
        case ["exit", number] if number.isdecimal() and int(number) < 256:
            return int(number)
        case ["signal", number] if number.isdecimal() and int(number) < signal.NSIG:
            return _SIGNALLED + int(number)
        case ["failed", *rest]:
            raise GuestFailedError(f"the guest failed: {' '.join(rest)[:300]}")
    raise GuestFailedError(
        "the guest ended without telling how its command did", "look at its console (--verbose)"
    )
