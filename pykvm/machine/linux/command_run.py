"""Running a command in a Linux guest, with this process's streams as the command's."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final

from pykvm.control.directory import MachineDirectory
from pykvm.devices.virtio.console import Console as VirtioConsole
from pykvm.devices.virtio.console import Port
from pykvm.kvm import Kvm
from pykvm.machine.linux.command import (
    STATUS_PORT,
    STREAM_PORTS,
    Command,
    GuestFailedError,
    exit_status,
)
from pykvm.machine.linux.config import MachineConfig, Share
from pykvm.machine.linux.console import Console
from pykvm.machine.linux.devices import configured_networks
from pykvm.machine.linux.foreground import confine, tell
from pykvm.machine.linux.machine import End, LinuxMachine
from pykvm.machine.linux.service import MachineService
from pykvm.sandbox import Confinement

__all__ = ["KERNEL_LINE", "ROOT_TAG", "is_terminal", "run_command"]

KERNEL_LINE: Final = "console=ttyS0 quiet cryptomgr.notests panic=-1"
"""Command line of the kernel: no messages but errors, no self-tests, and an end after a panic."""

ROOT_TAG: Final = "root"
"""Tag of the directory of the host that is the guest's root file system."""

_PATIENCE: Final = 10.0  # seconds for a reader to take what the guest had written
_MOST_STATUS: Final = 4096
_LAST_LINES: Final = 12


def is_terminal() -> bool:
    """Return whether a user sits before standard input and output."""
    return os.isatty(0) and os.isatty(1)


def run_command(
    kvm: Kvm,
    config: MachineConfig,
    command: Command,
    root: Path | None,
    *,
    confinement: Confinement | None,
    verbose: bool = False,
) -> int:
    """Run a command in a new guest; return its exit status, as a shell would.

    Args:
        kvm: an open ``/dev/kvm``.
        config: the machine; the command's initial RAM disks and root file system are added.
        command: the command.
        root: directory of the host that is the root file system; None where `command.root` is a
            disk of the machine.
        confinement: what this process may still do from the guest's start on; None leaves it
            unconfined.
        verbose: whether the kernel's messages go to standard error.

    Raises:
        GuestFailedError: the guest could not run it, or has ended before it did.
        PykvmError: the machine cannot be made, see `LinuxMachine`.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(MachineDirectory(config.name or None))
        status_read, status_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, status_read)
        stack.callback(os.close, status_write)
        networks = []
        for network in configured_networks(config):
            networks.append(stack.enter_context(network))
        if networks:
            addresses = [network.address for network in networks]
            modules = (*command.modules, "virtio_net")
            command = replace(command, addresses=addresses, modules=modules)
        if config.disks:
            command = replace(command, modules=(*command.modules, "virtio_blk"))
        shares = (Share(ROOT_TAG, root, read_only=not command.writable),) if root else ()
        config = replace(
            config,
            command_line=f"{KERNEL_LINE} {config.command_line}".strip(),
            initrds=command.initrds(config.kernel, directory.path),
            shares=shares + config.shares,
        )
        machine = stack.enter_context(
            LinuxMachine(kvm, config, 2 if verbose else None, networks=networks)
        )
        machine.tell = tell
        with (
            MachineService(machine, directory),
            _streams(machine, command.terminal, status_write) as console,
        ):
            confine(directory, confinement)
            end = machine.run()
        console.flush(_PATIENCE)
        try:
            told = os.read(status_read, _MOST_STATUS)
        except BlockingIOError:
            told = b""
        if end is End.STOPPED:
            return 128 + signal.SIGINT  # the user has left it by the escape
        if not told and not verbose:
            lines = machine.serial.tail().decode(errors="replace").splitlines()[-_LAST_LINES:]
            said = "\n".join(lines)
            what = "the guest's kernel has panicked" if end is End.PANIC else "the guest has ended"
            raise GuestFailedError(f"{what} before its command did; it said last:\n{said}")
        return exit_status(told)


@contextmanager
def _streams(machine: LinuxMachine, terminal: bool, status: int) -> Iterator[VirtioConsole]:
    """Give the machine a console whose ports are this process's streams, while the machine runs."""
    with ExitStack() as stack:
        if terminal:
            # Keys pass through this process, which looks for the escape; output does not.
            keys_read, keys_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, keys_read)
            ports = [Port("console", keys_read, 1, is_console=True)]
        else:
            into, *out = (_usable(descriptor, stack) for descriptor in (0, 1, 2))
            ports = [Port("console"), Port(STREAM_PORTS[0], into)]
            ports += [Port(n, None, d) for n, d in zip(STREAM_PORTS[1:], out, strict=True)]
        ports.append(Port(STATUS_PORT, None, status))
        console = VirtioConsole(machine.memory, ports, _size() if terminal else None)
        machine.add_device(console)
        if terminal:
            stack.enter_context(_Keys(keys_write, machine))
            stack.enter_context(_following_size(console))
        yield console


class _Keys(Console):
    """The terminal's keys, into a pipe."""

    def __init__(self, pipe: int, machine: LinuxMachine) -> None:
        self._pipe = pipe
        super().__init__(self._put, machine.stop)

    def _put(self, data: bytes) -> int:
        try:
            return os.write(self._pipe, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        super().close()
        pipe, self._pipe = self._pipe, -1
        if pipe >= 0:
            os.close(pipe)


def _usable(descriptor: int, stack: ExitStack) -> int:
    """Return a standard stream, or /dev/null where this process was started without it."""
    wrong = os.O_WRONLY if descriptor == 0 else os.O_RDONLY
    try:
        usable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != wrong
    except OSError:
        usable = False
    if not usable:
        descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
    return descriptor


def _size() -> tuple[int, int]:
    found = os.get_terminal_size(1)
    return found.columns, found.lines


@contextmanager
def _following_size(console: VirtioConsole) -> Iterator[None]:
    """Tell the guest when the terminal's size changes."""

    def changed(number: int, frame: FrameType | None) -> None:
        console.resize(*os.get_terminal_size(1))

    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
