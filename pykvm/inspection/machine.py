"""`Inspectable`: the part of a machine that inspection uses."""

from collections.abc import Sequence
from typing import Protocol

from pykvm.inspection.vcpu_gate import VcpuGate
from pykvm.kvm import Vcpu
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["Inspectable"]


class Inspectable(Protocol):
    """A machine that can be inspected."""

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """Its processors; the list does not change."""

    @property
    def memory(self) -> GuestMemory:
        """Its physical memory."""

    @property
    def gate(self) -> VcpuGate:
        """The gate in which the threads of its processors run them (`VcpuGate.run`)."""

    def stop(self) -> None:
        """End the machine as it is. From any thread; does not wait."""
