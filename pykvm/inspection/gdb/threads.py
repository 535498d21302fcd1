"""Threads, as GDB calls the vCPUs of a machine."""

from __future__ import annotations

from xml.sax.saxutils import escape

from pykvm.inspection.gdb.arguments import ArgumentError
from pykvm.inspection.hang import state
from pykvm.inspection.machine import Inspectable
from pykvm.kvm import Vcpu

__all__ = ["Threads"]


class Threads:
    """The vCPUs of a machine by the numbers of threads, and those that a client has selected.

    Attributes:
        selected: the thread whose registers and memory the client looks at.
        to_run: the thread that the packets c and s run; 0 or less for all.
    """

    def __init__(self, machine: Inspectable) -> None:
        # No thread has the number 0.
        self.vcpus = {vcpu.id + 1: vcpu for vcpu in machine.vcpus}
        self.selected = min(self.vcpus)
        self.to_run = 0

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU of the selected thread."""
        return self.vcpus[self.selected]

    @staticmethod
    def of(vcpu: int) -> int:
        """Return the thread of a vCPU's id."""
        return vcpu + 1

    def require(self, thread: int) -> int:
        """Return a thread's number if it is one; 0 and less stand for any or all.

        Raises:
            ArgumentError: it is none.
        """
        if thread > 0 and thread not in self.vcpus:
            raise ArgumentError
        return thread

    def state(self, thread: int) -> str:
        """Return what a thread does, in words.

        Raises:
            ArgumentError: it is none.
        """
        if thread not in self.vcpus:
            raise ArgumentError
        return state(self.vcpus[thread])

    def xml(self) -> bytes:
        """Return the list for qXfer:threads:read."""
        lines = [
            f'<thread id="{thread:x}" core="{vcpu.id}" name="vcpu {vcpu.id}">'
            f"{escape(state(vcpu))}</thread>\n"
            for thread, vcpu in self.vcpus.items()
        ]
        return "".join(['<?xml version="1.0"?>\n<threads>\n', *lines, "</threads>\n"]).encode()
