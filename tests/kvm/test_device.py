"""pykvm.kvm.device: devices in the kernel, and attributes of any handle."""

import errno
import os

import pytest

from pykvm.kvm import IoctlError, Kvm, Vm, lib
from pykvm.kvm.handle import Handle
from tests.rigs.needs import need

pytestmark = pytest.mark.kvm


def test_a_device(vm: Vm) -> None:
    if not vm.has_device(lib.KVM_DEV_TYPE_VFIO):  # the only one on x86; a kernel may lack it
        with pytest.raises(IoctlError) as caught:
            vm.create_device(lib.KVM_DEV_TYPE_VFIO)
        assert caught.value.errno == errno.ENODEV
        return
    device = vm.create_device(lib.KVM_DEV_TYPE_VFIO)
    fd = device.fileno()
    assert not device.has_device_attr(99, 0)
    with pytest.raises(IoctlError) as caught:
        device.set_device_attr(99, 0, bytes(8))
    assert caught.value.errno in (errno.ENXIO, errno.ENOTTY)
    device.close()
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_no_such_device(vm: Vm) -> None:
    assert not vm.has_device(9999)
    with pytest.raises(IoctlError, match="KVM_CREATE_DEVICE") as caught:
        vm.create_device(9999)
    assert caught.value.errno == errno.ENODEV


def test_devices_close_with_their_vm(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        children: list[Handle] = [vm.create_vcpu(0), vm.stats()]
        if vm.has_device(lib.KVM_DEV_TYPE_VFIO):
            children.append(vm.create_device(lib.KVM_DEV_TYPE_VFIO))
    assert all(child.closed for child in children)


def test_system_attribute(kvm: Kvm) -> None:
    need(kvm, "KVM_CAP_SYS_ATTRIBUTES")
    assert kvm.has_device_attr(0, lib.KVM_X86_XCOMP_GUEST_SUPP)
    mask = int.from_bytes(kvm.get_device_attr(0, lib.KVM_X86_XCOMP_GUEST_SUPP), "little")
    # Bits 0 and 1: x87 and SSE, always there together; 0 on a processor without XSAVE.
    assert mask & 3 == (3 if kvm.check_extension("KVM_CAP_XCRS") else 0)
    assert not kvm.has_device_attr(0, 12345)
