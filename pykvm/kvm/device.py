"""Devices that KVM keeps behind a descriptor of their own, and device attributes.

Attributes are the same calls on system, VM, vCPU and device descriptors.
Source: Documentation/virt/kvm/api.rst 4.79 and 4.80, Documentation/virt/kvm/devices/.
"""

from __future__ import annotations

from typing import ClassVar

from pykvm.kvm.handle import Handle
from pykvm.kvm.ioctls import IOCTLS, Scope
from pykvm.kvm.native import ffi
from pykvm.sizes import PAGE_SIZE

__all__ = ["Attributes", "Device"]


class Attributes(Handle):
    """Get, set and probe device attributes."""

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Return whether the descriptor has the attribute; False where it has none at all."""
        needed = IOCTLS["KVM_HAS_DEVICE_ATTR"].needs(self.scope)
        if needed and not self.check_extension(needed):
            return False
        request = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr})
        return self._raw_ioctl(IOCTLS["KVM_HAS_DEVICE_ATTR"], request) == 0

    def get_device_attr(self, group: int, attr: int, size: int = 8) -> bytes:
        """Return the value of an attribute, `size` bytes.

        Raises:
            CapabilityMissingError: the descriptor has no attributes.
            IoctlError: it does not have this one.
        """
        # The kernel knows the attribute's size, and writes that much whatever was asked for.
        value = ffi.new("char[]", max(size, PAGE_SIZE))
        self._attr("KVM_GET_DEVICE_ATTR", group, attr, value)
        return ffi.buffer(value, size)[:]

    def set_device_attr(self, group: int, attr: int, value: bytes) -> None:
        """Set an attribute to a value of as many bytes as it defines.

        Raises:
            CapabilityMissingError: the descriptor has no attributes.
            IoctlError: it does not have this one, or not with that value.
        """
        area = ffi.new("char[]", max(len(value), PAGE_SIZE))
        ffi.buffer(area)[0 : len(value)] = value
        self._attr("KVM_SET_DEVICE_ATTR", group, attr, area)

    def _attr(self, name: str, group: int, attr: int, value: object) -> None:
        request = ffi.new("struct kvm_device_attr *")
        request.group = group
        request.attr = attr
        request.addr = int(ffi.cast("uintptr_t", value))
        self.ioctl(name, request)


class Device(Attributes):
    """A device made by `Vm.create_device`.

    Attributes:
        type: its ``KVM_DEV_TYPE_*`` number.
    """

    scope: ClassVar[Scope] = Scope.DEVICE

    def __init__(self, vm: Handle, fd: int, type: int) -> None:
        super().__init__(fd, vm)
        self.type = type
