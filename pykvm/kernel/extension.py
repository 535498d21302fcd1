"""Questions to the loaded KVM that need no handle of `pykvm.kvm`."""

import fcntl
import os

from pykvm.kvm import lib

__all__ = ["check_extension"]


def check_extension(capability: int) -> int:
    """Return what KVM says of a capability; 0 where it has it not, and without `/dev/kvm`.

    Source: KVM_CHECK_EXTENSION, Documentation/virt/kvm/api.rst 4.4.
    """
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        value: int = fcntl.ioctl(device, lib.KVM_CHECK_EXTENSION, capability)
    except OSError:
        return 0
    finally:
        os.close(device)
    return value
