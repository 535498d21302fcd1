"""`Kvm`: the handle on /dev/kvm.

Source: Documentation/virt/kvm/api.rst, "Type: system ioctl".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.cpuid import CpuidEntry, read_cpuid
from pykvm.kvm.device import Attributes
from pykvm.kvm.errors import (
    ApiVersionError,
    KvmError,
    KvmMissingError,
    KvmPermissionError,
    NotKvmError,
)
from pykvm.kvm.handle import capability_number
from pykvm.kvm.ioctls import IOCTLS, Capability, Scope
from pykvm.kvm.msr import read_msr_list, read_msrs
from pykvm.kvm.vm import Vm

__all__ = ["Kvm"]

API_VERSION = 12
"""The version that every kernel since 2.6.22 answers (api.rst 4.1); no macro promises it."""


class Kvm(Attributes):
    """An open /dev/kvm.

    Raises KvmMissingError, KvmPermissionError, NotKvmError, ApiVersionError::

        with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            ...
    """

    scope: ClassVar[Scope] = Scope.SYSTEM

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        super().__init__(_open(Path(path)))
        self._extensions: dict[int, int] = {}
        try:
            version = self._raw_ioctl(IOCTLS["KVM_GET_API_VERSION"])
            if version < 0:
                raise NotKvmError(f"{path} is not the kvm device: use /dev/kvm", -version)
            if version != API_VERSION:
                raise ApiVersionError(
                    f"{path} speaks version {version} of the api and not {API_VERSION}: "
                    "boot a kernel newer than 2.6.22"
                )
        except KvmError:
            self.close()
            raise

    def check_extension(self, capability: str | int | Capability) -> int:
        number = capability_number(capability)
        if number not in self._extensions:
            self._extensions[number] = max(
                self._raw_ioctl(IOCTLS["KVM_CHECK_EXTENSION"], number), 0
            )
        return self._extensions[number]

    def extensions(self) -> dict[str, int]:
        """Every capability that this KVM has and pykvm's build knows by name."""
        names = sorted(name for name in dir(lib) if name.startswith("KVM_CAP_"))
        return {name: value for name in names if (value := self.check_extension(name))}

    def vcpu_mmap_size(self) -> int:
        """Bytes of the area that holds struct kvm_run."""
        return self.ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def create_vm(self, machine_type: int = 0) -> Vm:
        """A VM without memory or vCPUs. machine_type: a number of KVM_CAP_VM_TYPES, 0 the plain."""
        return Vm(self, self.ioctl("KVM_CREATE_VM", machine_type))

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What host and KVM can give a guest: the usual argument of `Vcpu.set_cpuid`."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_SUPPORTED_CPUID", table))

    def emulated_cpuid(self) -> list[CpuidEntry]:
        """Features that KVM emulates though the host lacks them: slow."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_EMULATED_CPUID", table))

    def msr_index_list(self) -> list[int]:
        """Numbers of the MSRs that make up a vCPU's state."""
        return read_msr_list(lambda table: self.ioctl("KVM_GET_MSR_INDEX_LIST", table))

    def msr_feature_index_list(self) -> list[int]:
        """Numbers of the MSRs that describe features of host and KVM."""
        return read_msr_list(lambda table: self.ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", table))

    def feature_msrs(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        """Values of feature MSRs, all of them by default."""
        wanted = self.msr_feature_index_list() if indices is None else indices
        return read_msrs(lambda table: self.ioctl("KVM_GET_MSRS", table), wanted)

    def mce_capabilities(self) -> int:
        """What `Vcpu.setup_mce` may ask for (MCG_CAP)."""
        value: Any = ffi.new("__u64 *")
        self.ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
        return int(value[0])


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KvmPermissionError(
                f"no permission for {path}: type `sudo usermod -aG kvm $USER` and log in again",
                error.errno,
            ) from error
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise KvmMissingError(
                f"no {path} here: type `sudo modprobe kvm-intel` (or kvm-amd), "
                "or `pykvm testbed` for an emulated host",
                error.errno,
            ) from error
        raise KvmError(
            f"cannot open {path} ({os.strerror(error.errno or 0).lower()}): type `pykvm doctor`",
            error.errno,
        ) from error
