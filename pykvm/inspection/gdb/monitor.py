"""Commands that GDB passes on: `monitor exits`, `monitor walk ADDRESS` and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.hang import report
from pykvm.inspection.machine import Inspectable
from pykvm.inspection.metrics import exit_table
from pykvm.inspection.walk import describe_walk, parse_address
from pykvm.kvm import Vcpu

__all__ = ["run_command"]


def run_command(line: str, machine: Inspectable, vcpu: Vcpu) -> str:
    """Run a command and return what it prints; an error is printed too.

    Args:
        line: the command with its arguments.
        machine: the machine, which is stopped.
        vcpu: the vCPU that the client has selected.
    """
    name, *arguments = line.split() or ["help"]
    command = _COMMANDS.get(name)
    if command is None or len(arguments) != len(command[0].split()) - 1:
        return "\n".join(f"monitor {usage:<14} {text}" for usage, text, _ in _COMMANDS.values())
    try:
        return command[2](machine, vcpu, *arguments)
    except PykvmError as error:
        return str(error)


def _walk(machine: Inspectable, vcpu: Vcpu, address: str) -> str:
    return describe_walk(vcpu, machine.memory, parse_address(address))


_Command = tuple[str, str, Callable[..., str]]

_COMMANDS: Final[dict[str, _Command]] = {
    "exits": (
        "exits",
        "exits of each vcpu by reason",
        lambda machine, _vcpu: exit_table(machine.vcpus),
    ),
    "report": (
        "report",
        "state, registers, instruction, page walk and last exits of each vcpu",
        lambda machine, _vcpu: report(machine),
    ),
    "walk": ("walk ADDRESS", "the guest's page tables for a virtual address", _walk),
    "help": ("help", "this list", lambda _machine, _vcpu: run_command("?", _machine, _vcpu)),
}
