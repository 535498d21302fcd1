"""Devices that KVM keeps behind a descriptor of their own, and device attributes.

Attributes are the same four calls on system, VM, vCPU and device descriptors.
Source: Documentation/virt/kvm/api.rst 4.79 and 4.80, Documentation/virt/kvm/devices/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.kvm._kvm import ffi
from pykvm.kvm.handle import Handle
from pykvm.kvm.ioctls import IOCTLS, Capability, Scope

if TYPE_CHECKING:
    from pykvm.kvm.vm import Vm

__all__ = ["Attributes", "Device"]


class Attributes(Handle):
    """Get, set and probe device attributes."""

    def has_attr(self, group: int, attr: int) -> bool:
        """Whether this descriptor has the attribute; False where it has no attributes at all."""
        needed = IOCTLS["KVM_HAS_DEVICE_ATTR"].needs(self.scope)
        if needed and not self.check_extension(needed):
            return False
        request = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr})
        return self._raw_ioctl(IOCTLS["KVM_HAS_DEVICE_ATTR"], request) == 0

    def get_attr(self, group: int, attr: int, size: int = 8) -> bytes:
        """The value of an attribute, `size` bytes. Raises CapabilityMissingError, IoctlError."""
        value = ffi.new("char[]", size)
        self._attr("KVM_GET_DEVICE_ATTR", group, attr, value)
        return ffi.buffer(value)[:]

    def set_attr(self, group: int, attr: int, value: bytes) -> None:
        """Set an attribute; value: as many bytes as it defines."""
        self._attr("KVM_SET_DEVICE_ATTR", group, attr, ffi.from_buffer(value))

    def _attr(self, name: str, group: int, attr: int, value: object) -> None:
        request = ffi.new("struct kvm_device_attr *")
        request.group = group
        request.attr = attr
        request.addr = int(ffi.cast("uintptr_t", value))
        self.ioctl(name, request)


class Device(Attributes):
    """A device made by `Vm.create_device`; `type` is its ``KVM_DEV_TYPE_*`` number."""

    scope = Scope.DEVICE

    def __init__(self, vm: Vm, fd: int, type: int) -> None:
        super().__init__(fd)
        self.vm = vm
        self.type = type

    def check_extension(self, capability: str | int | Capability) -> int:
        return self.vm.check_extension(capability)
