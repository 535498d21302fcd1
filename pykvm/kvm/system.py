"""`Kvm`: the handle on /dev/kvm.

Source: Documentation/virt/kvm/api.rst, "Type: system ioctl".
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import ClassVar

from pykvm.kvm.errors import (
    ApiVersionError,
    KvmError,
    KvmMissingError,
    KvmPermissionError,
    NotKvmError,
)
from pykvm.kvm.ioctls import IOCTLS, Scope
from pykvm.kvm.native import lib
from pykvm.kvm.vm import Vm
from pykvm.kvm.x86.system import X86System

__all__ = ["Kvm"]

API_VERSION = 12
"""The version that every kernel since 2.6.22 answers (api.rst 4.1); no macro promises it."""


class Kvm(X86System):
    """An open /dev/kvm. It works in a forked process too, for VMs that are made there::

        with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            ...

    Args:
        path: the device.

    Raises:
        KvmMissingError: there is no such device.
        KvmPermissionError: this user may not open it.
        NotKvmError: the file is not the KVM device.
        ApiVersionError: it speaks another version of the interface.
    """

    scope: ClassVar[Scope] = Scope.SYSTEM

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        super().__init__(_open(Path(path)))
        try:
            version = self._raw_ioctl(IOCTLS["KVM_GET_API_VERSION"])
            if version < 0:
                raise NotKvmError(f"{path} is not the kvm device", "use /dev/kvm", errno=-version)
            if version != API_VERSION:
                raise ApiVersionError(
                    f"{path} speaks version {version} of the api and not {API_VERSION}",
                    "boot a kernel newer than 2.6.22",
                )
        except KvmError:
            self.close()
            raise

    def extensions(self) -> dict[str, int]:
        """Return every capability that this KVM has and pykvm's build knows by name."""
        names = sorted(name for name in dir(lib) if name.startswith("KVM_CAP_"))
        return {name: value for name in names if (value := self.check_extension(name))}

    def get_vcpu_mmap_size(self) -> int:
        """Return the bytes of the area that holds struct kvm_run."""
        return self.ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def create_vm(self, machine_type: int = 0) -> Vm:
        """Make a VM without memory or vCPUs.

        Args:
            machine_type: a number of KVM_CAP_VM_TYPES; 0 is the plain one.

        Raises:
            IoctlError: this KVM has no such type, or no memory.
        """
        size = self.get_vcpu_mmap_size()
        return Vm(self, self.ioctl("KVM_CREATE_VM", machine_type), size)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KvmPermissionError(
                f"no permission for {path}",
                "type `pykvm doctor` to see how to get it",
                errno=error.errno,
            ) from error
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise KvmMissingError(
                f"no {path} here",
                "type `pykvm doctor` to see how to get it",
                errno=error.errno,
            ) from error
        raise KvmError(
            f"cannot open {path} ({os.strerror(error.errno or 0).lower()})",
            "type `pykvm doctor`",
            errno=error.errno,
        ) from error
