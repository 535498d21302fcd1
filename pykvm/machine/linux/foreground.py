"""A machine whose serial console is this terminal, under its name, until it ends."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Final

from pykvm.inspect.watch import ProgressWatch
from pykvm.kvm import UnexpectedExitError
from pykvm.machine.linux.console import Console
from pykvm.machine.linux.machine import End, LinuxMachine, MachineCrashedError
from pykvm.machine.linux.service import MachineService

__all__ = ["PANIC_STATUS", "run_in_foreground", "status_of"]

PANIC_STATUS: Final = 70
"""Exit status after a panic of the guest's kernel."""


def run_in_foreground(machine: LinuxMachine, name: str = "") -> End:
    """Run a machine until it ends, with a console and a control socket; return why it ended.

    What goes wrong in the guest is told on standard error: a report where it crashes, or makes no
    progress.

    Args:
        machine: the machine.
        name: its name; empty for the first free one.

    Raises:
        MachineNameError: the name is none, or is taken.
        PykvmError: see `LinuxMachine.run`.
    """
    with ExitStack() as stack:
        stack.enter_context(MachineService(machine, name))
        stack.enter_context(Console(machine.serial.feed, machine.stop))
        stack.enter_context(ProgressWatch(machine, _tell))
        try:
            return machine.run()
        except (MachineCrashedError, UnexpectedExitError) as error:
            _tell(error.report)
            raise


def status_of(end: End, machine: LinuxMachine) -> int:
    """Return the exit status that tells how a machine has ended."""
    if end is End.PANIC:
        print("pykvm: the guest's kernel has panicked", file=sys.stderr)
        return PANIC_STATUS
    return machine.exit_status if end is End.EXIT else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
