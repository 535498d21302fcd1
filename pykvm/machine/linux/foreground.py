"""A machine whose serial console is this terminal, under its name, until it ends."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from pykvm.control.directory import MachineDirectory
from pykvm.inspection.watch import ProgressWatch
from pykvm.kvm import UnexpectedExitError
from pykvm.machine.linux.console import Console
from pykvm.machine.linux.machine import End, LinuxMachine, MachineCrashedError
from pykvm.machine.linux.service import MachineService
from pykvm.resources import CHECKOUT
from pykvm.sandbox import Confinement, enter

__all__ = ["PANIC_STATUS", "confine", "run_in_foreground", "status_of", "tell"]

PANIC_STATUS: Final = 70
"""Exit status after a panic of the guest's kernel."""


def run_in_foreground(machine: LinuxMachine, name: str, confinement: Confinement | None) -> End:
    """Run a machine until it ends, with a console and a control socket; return why it ended.

    What goes wrong in the guest is told on standard error: a report where it crashes, or makes no
    progress.

    Args:
        machine: the machine.
        name: its name; empty for the first free one.
        confinement: what this process may still do from now on, beside what the machine needs; None
            leaves it unconfined.

    Raises:
        MachineNameError: the name is none, or is taken.
        SandboxError: Linux refuses the confinement.
        PykvmError: see `LinuxMachine.run`.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(MachineDirectory(name or None))
        machine.tell = tell
        stack.enter_context(MachineService(machine, directory))
        stack.enter_context(Console(machine.serial.feed, machine.stop))
        stack.enter_context(ProgressWatch(machine, tell))
        confine(directory, confinement)
        try:
            return machine.run()
        except (MachineCrashedError, UnexpectedExitError) as error:
            tell(error.report)
            raise


def confine(directory: MachineDirectory, confinement: Confinement | None) -> None:
    """Confine this process to what a machine with this directory needs.

    Raises:
        SandboxError: Linux refuses it.
    """
    if confinement is not None:
        # A snapshot says which version has made it.
        version = () if CHECKOUT is None else (CHECKOUT / "pyproject.toml",)
        readable = (*confinement.readable, *version)
        enter(replace(confinement, directory=directory.path, readable=readable))


def status_of(end: End, machine: LinuxMachine) -> int:
    """Return the exit status that tells how a machine has ended."""
    if end is End.PANIC:
        print("pykvm: the guest's kernel has panicked", file=sys.stderr)
        return PANIC_STATUS
    return machine.exit_status if end is End.EXIT else 0


def tell(text: str) -> None:
    """Say something about a guest on standard error."""
    print(text, file=sys.stderr, flush=True)
