"""The part of `Kvm` that x86 alone has: CPUID and MSRs that this host can give to guests.

Source: Documentation/virt/kvm/api.rst, "Type: system ioctl".
"""

from __future__ import annotations

from collections.abc import Iterable

from pykvm.kvm.device import Attributes
from pykvm.kvm.native import Struct, ffi
from pykvm.kvm.x86.cpuid import CpuidEntry, read_cpuid
from pykvm.kvm.x86.msr import read_msr_list, read_msrs

__all__ = ["X86System"]


class X86System(Attributes):
    """CPUID, MSRs and machine checks that host and KVM support."""

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """Return what host and KVM can give a guest: the usual argument of `Vcpu.set_cpuid2`."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_SUPPORTED_CPUID", table))

    def get_emulated_cpuid(self) -> list[CpuidEntry]:
        """Return features that KVM emulates though the host lacks them: slow."""
        return read_cpuid(lambda table: self.ioctl("KVM_GET_EMULATED_CPUID", table))

    def get_msr_index_list(self) -> list[int]:
        """Return numbers of the MSRs that make up a vCPU's state."""
        return read_msr_list(lambda table: self.ioctl("KVM_GET_MSR_INDEX_LIST", table))

    def get_msr_feature_index_list(self) -> list[int]:
        """Return numbers of the MSRs that describe features of host and KVM."""
        return read_msr_list(lambda table: self.ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", table))

    def get_msrs(self, indices: Iterable[int] | None = None) -> dict[int, int]:
        """Return values of feature MSRs, all of them by default.

        Raises:
            MsrError: KVM does not read one of the indices.
        """

        def call(table: Struct) -> int:
            return self.ioctl("KVM_GET_MSRS", table)

        wanted = self.get_msr_feature_index_list() if indices is None else indices
        return read_msrs(call, wanted, known=tuple)

    def get_mce_cap_supported(self) -> int:
        """Return what `Vcpu.setup_mce` may ask for (MCG_CAP)."""
        value = ffi.new("__u64 *")
        self.ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
        return int(value[0])
