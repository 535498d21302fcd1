"""`Vm`: the handle on one virtual machine.

Source: Documentation/virt/kvm/api.rst, "Type: vm ioctl".
"""

from __future__ import annotations

from typing import ClassVar

from pykvm.kvm.device import Device
from pykvm.kvm.handlers import Handlers
from pykvm.kvm.interrupts import Interrupts
from pykvm.kvm.ioctls import IOCTLS, Scope
from pykvm.kvm.memory_slots import MemorySlots
from pykvm.kvm.native import ffi, lib
from pykvm.kvm.stats import Stats
from pykvm.kvm.vcpu import Vcpu
from pykvm.kvm.x86.system import X86System
from pykvm.kvm.x86.vm import X86Vm

__all__ = ["Vm"]


class Vm(MemorySlots, Interrupts, X86Vm):
    """A virtual machine, which closes together with the vCPUs, devices and contexts made from it.

    Attributes:
        kvm: the handle that it was made with.
        handlers: what its vCPUs serve without Python.
    """

    scope: ClassVar[Scope] = Scope.VM

    def __init__(self, kvm: X86System, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd, kvm)
        self.kvm = kvm
        self.handlers = Handlers()
        self._vcpu_mmap_size = vcpu_mmap_size

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """Make a vCPU.

        Args:
            vcpu_id: its APIC id, below KVM_CAP_MAX_VCPU_ID.

        Raises:
            IoctlError: the id is taken, or too large, or there are too many vCPUs.
        """
        fd = self.ioctl("KVM_CREATE_VCPU", vcpu_id)
        return self.adopt(Vcpu(self, fd, vcpu_id, self._vcpu_mmap_size, self.handlers))

    def create_device(self, device_type: int) -> Device:
        """Make a device in the kernel.

        Args:
            device_type: ``lib.KVM_DEV_TYPE_*``.

        Raises:
            IoctlError: this KVM has no such device (ENODEV).
        """
        request = ffi.new("struct kvm_create_device *", {"type": device_type})
        self.ioctl("KVM_CREATE_DEVICE", request)
        return self.adopt(Device(self, request.fd, device_type))

    def has_device(self, device_type: int) -> bool:
        """Return whether `create_device` would make one; make none."""
        request = ffi.new("struct kvm_create_device *", {"type": device_type})
        request.flags = lib.KVM_CREATE_DEVICE_TEST
        return self._raw_ioctl(IOCTLS["KVM_CREATE_DEVICE"], request) == 0

    def stats(self) -> Stats:
        """Open KVM's counters of this VM, which close with it."""
        return self.adopt(Stats(self.ioctl("KVM_GET_STATS_FD")))
