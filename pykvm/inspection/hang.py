"""A report on a guest that makes no progress, and how to tell that it makes none.

The report has each vCPU's state, registers, instruction and last exits (`pykvm.kvm.x86.report`),
and the walk of its instruction pointer through the guest's page tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from pykvm.errors import PykvmError
from pykvm.inspection.address_space import AddressSpace
from pykvm.inspection.machine import Inspectable
from pykvm.inspection.walk import describe_walk
from pykvm.kvm import CapabilityMissingError, MpState, Vcpu
from pykvm.kvm.x86.report import describe, linear_address

__all__ = ["Progress", "Sample", "compare", "report", "sample", "state"]

_IF = 1 << 9  # RFLAGS (SDM vol. 1, 3.4.3)

_STATES = {
    MpState.RUNNABLE: "runs",
    MpState.UNINITIALIZED: "waits to be started",
    MpState.INIT_RECEIVED: "waits to be started",
    MpState.HALTED: "halted",
    MpState.SIPI_RECEIVED: "is being started",
    MpState.AP_RESET_HOLD: "waits to be started",
}


def state(vcpu: Vcpu) -> str:
    """Return what a paused vCPU does, in a few words."""
    try:
        found = vcpu.get_mp_state()
        interrupts = bool(vcpu.get_regs().rflags & _IF)
    except CapabilityMissingError:
        return "runs"
    except PykvmError as error:
        return f"unknown: {error.problem}"
    if found is MpState.HALTED and not interrupts:
        return "halted for ever, interrupts off"
    return _STATES[found]


def report(machine: Inspectable) -> str:
    """Pause the machine and return the report, several lines for each vCPU.

    A part that cannot be read says so instead of raising.

    Raises:
        PauseError: a vCPU does not stop.
    """
    with machine.gate.paused():
        return "\n\n".join(_report(machine, vcpu) for vcpu in machine.vcpus)


def _report(machine: Inspectable, vcpu: Vcpu) -> str:
    translate = AddressSpace(vcpu, machine.memory).physical
    past, read = vcpu.last_exits(), vcpu.vm.read_physical
    text = describe(vcpu, vcpu.id, state(vcpu), past, read, translate)
    return f"{text}\npage walk of the instruction:\n{_walk_of_rip(machine, vcpu)}"


def _walk_of_rip(machine: Inspectable, vcpu: Vcpu) -> str:
    try:
        address = linear_address(vcpu.get_regs(), vcpu.get_sregs())
        walk = describe_walk(vcpu, machine.memory, address)
    except PykvmError as error:
        walk = f"none: {error}"
    return "\n".join(f"  {line}" for line in walk.splitlines())


# ---- progress ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """State of a vCPU at one moment.

    Attributes:
        state: see `state`.
        rip: its instruction pointer.
        cpl: its privilege level.
        exits: its exits so far, without interrupted ones.
    """

    state: str
    rip: int
    cpl: int
    exits: int


@dataclass(frozen=True)
class Progress:
    """Comparison of two samples of a machine.

    Attributes:
        stuck: ids of the vCPUs without a sign of progress, with the reason.
        dead: whether no vCPU can ever go on: each is halted with interrupts off, or has not been
            started.
    """

    stuck: dict[int, str]
    dead: bool


def sample(machine: Inspectable) -> dict[int, Sample]:
    """Pause the machine for a moment and return what each vCPU does.

    Raises:
        PauseError: a vCPU does not stop.
        KvmError: see `Vcpu.get_regs`.
    """
    with machine.gate.paused():
        return {vcpu.id: _sample(vcpu) for vcpu in machine.vcpus}


def _sample(vcpu: Vcpu) -> Sample:
    counts = vcpu.exit_counts()
    exits = sum(counts.native.values()) + sum(counts.returned.values())
    return Sample(state(vcpu), vcpu.get_regs().rip, vcpu.get_sregs().ss.dpl, exits)


_NEAR = 256
"""Bytes that a loop of a stuck processor spans at most."""


def compare(before: dict[int, Sample], after: dict[int, Sample]) -> Progress:
    """Return which vCPUs have shown no progress between two samples, seconds apart.

    A vCPU is stuck if it is halted with interrupts off, or if it runs a kernel, has used no device
    and its instruction pointer has not gone far. One that waits for an interrupt or to be started
    is idle. A user's program may compute as long as it likes.
    """
    stuck = {}
    for number, now in after.items():
        was = before.get(number)
        if now.state.startswith("halted for ever"):
            stuck[number] = now.state
        elif (
            was is not None
            and now.state == was.state == "runs"
            and now.cpl == was.cpl == 0
            and now.exits == was.exits
            and abs(now.rip - was.rip) < _NEAR
        ):
            stuck[number] = f"spins near {now.rip:#x} without an exit"
    never = ("halted for ever, interrupts off", "waits to be started")
    return Progress(stuck, all(each.state in never for each in after.values()))
