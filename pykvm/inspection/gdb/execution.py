"""How a debugger stops and resumes a machine.

All vCPUs stop when one does (all-stop mode). A vCPU's thread reports a `Debug` exit with
`Execution.debug_exit`, which holds all vCPUs in the gate and wakes the stub; the stub collects it
with `Execution.stopped`. Everything else is called by the stub's thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.address_space import AddressSpace
from pykvm.inspection.gdb.breakpoints import Arrangement, Breakpoints, Kind, Point
from pykvm.inspection.machine import Inspectable
from pykvm.inspection.vcpu_gate import PauseError
from pykvm.kvm import Debug, Vcpu, lib

__all__ = ["Execution", "Stop"]

SIGINT: Final = 2  # by GDB's numbers
SIGTRAP: Final = 5

_DB: Final = 1
_SINGLE_STEP: Final = 1 << 14  # DR6.BS


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the machine has stopped.

    Attributes:
        vcpu: id of the vCPU that has stopped it.
        signal: by GDB's numbers.
        point: the breakpoint or watchpoint, if one was met.
    """

    vcpu: int
    signal: int
    point: Point | None = None


class Execution:
    """The debugger's side of the gate; the machine is stopped by it from `attach` on.

    Args:
        machine: the machine.
        wake: called from a vCPU's thread when there is something to collect with `stopped`.
    """

    def __init__(self, machine: Inspectable, wake: Callable[[], object]) -> None:
        self._machine = machine
        self._wake = wake
        self._numbers = [vcpu.id for vcpu in machine.vcpus]
        self._lock = threading.Lock()
        self._stops: dict[int, Stop] = {}
        self._stepping: frozenset[int] = frozenset()
        self._arranged = Arrangement()
        self._attached = False
        self._last = Stop(self._numbers[0], SIGTRAP)
        self.breakpoints = Breakpoints(machine.memory)
        self.running = False

    @property
    def ended(self) -> bool:
        """True if the machine has ended, so that nothing runs any more."""
        return self._machine.gate.closed

    @property
    def last_stop(self) -> Stop:
        """Why the machine stands now."""
        return self._last

    # ---- the stub's thread ------------------------------------------------------------------

    def attach(self) -> None:
        """Stop the machine and take its `Debug` exits.

        Raises:
            PauseError: a vCPU does not stop, or another debugger is attached.
        """
        gate = self._machine.gate
        gate.attach(self)
        self._attached = True
        gate.hold(self._numbers)
        try:
            gate.settle()
        except PauseError:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove all breakpoints and let the machine run as if no debugger had been there."""
        gate = self._machine.gate
        try:
            gate.hold(self._numbers)
            with suppress(PauseError):  # a vCPU that a device keeps waiting
                gate.settle()
            self.breakpoints.clear()
            for vcpu in self._machine.vcpus:
                with suppress(PykvmError):  # it is closed or runs, or KVM cannot debug
                    vcpu.set_guest_debug()
        finally:
            self._attached = False
            gate.detach()
            gate.release(self._numbers)

    def resume(self, steps: Mapping[int, bool]) -> None:
        """Let vCPUs run; the others stay where they are.

        A watchpoint that another vCPU has met since is reported at once, and nothing runs.

        Args:
            steps: by the vCPU's id, whether it runs one instruction only.

        Raises:
            KvmError: KVM cannot debug a guest this way. Nothing runs.
        """
        if any(number in self._stops for number in steps):
            self.running = True
            self._wake()
            return
        self._stepping = frozenset(number for number, step in steps.items() if step)
        self._arranged = self.breakpoints.arrange()
        try:
            for vcpu in self._machine.vcpus:
                if vcpu.id in steps:
                    self._set_debug(vcpu)
        except PykvmError:
            self.breakpoints.take_out()
            raise
        self.running = True
        self._machine.gate.release(steps)

    def interrupt(self) -> None:
        """Stop the machine because the user asks; `stopped` then tells."""
        if self.running:
            self._machine.gate.hold(self._numbers)
            with self._lock:
                first = next(iter(self._stops), self._last.vcpu)
                self._stops.setdefault(first, Stop(first, SIGINT))
            self._wake()

    def stopped(self) -> Stop | None:
        """Return why the machine has stopped, or None if it runs, or has stood before.

        Raises:
            PauseError: a vCPU does not stop.
        """
        if not self.running or not self._stops:
            return None
        gate = self._machine.gate
        gate.hold(self._numbers)
        gate.settle()
        self.running = False
        self.breakpoints.take_out()
        with self._lock:
            # An event of the vCPU that was stepped comes first: the user waits for it.
            chosen = min(self._stops, key=lambda number: number not in self._stepping)
            self._last = self._stops.pop(chosen)
            # Breakpoints are met before their instruction, so they will be met again.
            self._stops = {
                number: stop
                for number, stop in self._stops.items()
                if stop.point is not None and stop.point.kind in (Kind.WRITE, Kind.ACCESS)
            }
        return self._last

    # ---- vCPU threads -----------------------------------------------------------------------

    def debug_exit(self, vcpu: Vcpu, found: Debug) -> None:
        """Stop the machine, or give the exception back to the guest if it is the guest's own."""
        if not self._attached:
            return
        stop = self._reason(vcpu, found)
        if stop is None:
            self._set_debug(vcpu, reinject=found.exception)
            return
        with self._lock:
            self._stops[vcpu.id] = stop
        self._machine.gate.hold(self._numbers)
        self._wake()

    def machine_ended(self) -> None:
        """Let the stub tell its client."""
        self._wake()

    def _reason(self, vcpu: Vcpu, found: Debug) -> Stop | None:
        arranged = self._arranged
        if found.exception != _DB:
            physical = AddressSpace(vcpu, self._machine.memory).physical(found.pc)
            if physical not in arranged.planted:
                return None
            return Stop(vcpu.id, SIGTRAP, Point(Kind.SOFTWARE, found.pc))
        for slot, point in enumerate(arranged.points):
            # Bits of registers that are not in use may be set too (SDM vol. 3B, 18.2.3).
            if found.dr6 >> slot & 1:
                return Stop(vcpu.id, SIGTRAP, point)
        if found.dr6 & _SINGLE_STEP and vcpu.id in self._stepping:
            return Stop(vcpu.id, SIGTRAP)
        return None

    def _set_debug(self, vcpu: Vcpu, reinject: int | None = None) -> None:
        step = vcpu.id in self._stepping
        flags = vcpu.check_extension("KVM_CAP_SET_GUEST_DEBUG2")
        vcpu.set_guest_debug(
            single_step=step,
            breakpoints=self._arranged.registers,
            software_breakpoints=bool(self._arranged.planted),
            # An interrupt would make each step one into its handler.
            block_interrupts=step and bool(flags & lib.KVM_GUESTDBG_BLOCKIRQ),
            reinject=reinject,
        )
