"""Whether this host's processor and KVM have the features that a saved vCPU was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pykvm.errors import PykvmError
from pykvm.kvm import CpuidEntry, Vcpu, find_leaf
from pykvm.kvm.x86.system import X86System

__all__ = ["HostFeatureError", "require_features"]

_REGISTERS: Final = ("eax", "ebx", "ecx", "edx")

_FEATURES: Final = (
    (0x1, 0, "ecx"),
    (0x1, 0, "edx"),
    (0x7, 0, "ebx"),
    (0x7, 0, "ecx"),
    (0x7, 0, "edx"),
    (0x7, 1, "eax"),
    (0x7, 1, "edx"),
    (0x7, 2, "edx"),
    (0xD, 0, "eax"),
    (0xD, 1, "eax"),
    (0x4000_0001, 0, "eax"),
    (0x8000_0001, 0, "ecx"),
    (0x8000_0001, 0, "edx"),
    (0x8000_0007, 0, "edx"),
    (0x8000_0008, 0, "ebx"),
)
"""Registers of CPUID whose bits each stand for a feature (SDM vol. 2A, CPUID; KVM's cpuid.rst)."""

_MONITOR: Final = 1 << 3
_TSC_DEADLINE: Final = 1 << 24
_OSXSAVE: Final = 1 << 27
_HYPERVISOR: Final = 1 << 31
_APIC: Final = 1 << 9
_OSPKE: Final = 1 << 4

_NOT_THE_HOSTS: Final = {
    (0x1, 0, "ecx"): _MONITOR | _TSC_DEADLINE | _OSXSAVE | _HYPERVISOR,
    (0x1, 0, "edx"): _APIC,
    (0x7, 0, "ecx"): _OSPKE,
}
"""Bits that follow the guest's control registers and MSRs, or that the machine sets by itself."""


class HostFeatureError(PykvmError):
    """A host that lacks what a saved machine was given."""


def require_features(
    system: X86System, vcpu: Vcpu, machine: Sequence[Sequence[CpuidEntry]]
) -> None:
    """Check that vCPUs with such CPUID leaves can run on this host.

    Args:
        system: an open ``/dev/kvm``.
        vcpu: a vCPU that has not run. It is left with the leaves that this KVM supports.
        machine: the leaves of each vCPU.

    Raises:
        HostFeatureError: the processor is another maker's, or it or KVM lacks a feature.
    """
    supported = system.get_supported_cpuid()
    # A KVM that cannot intercept CPUID shows a guest the processor's own leaves, which are more
    # than it supports.
    vcpu.set_cpuid2(supported)
    shown = vcpu.get_cpuid2()
    for saved in machine:
        if (was := _vendor(saved)) != (now := _vendor(supported)):
            raise HostFeatureError(
                f"the snapshot is of a machine on {was}, this processor is {now}",
                "restore it on a processor of the same maker",
            )
        missing = []
        for place in _FEATURES:
            there = _bits(supported, place) | _bits(shown, place) | _NOT_THE_HOSTS.get(place, 0)
            bits = _bits(saved, place) & ~there
            name = f"{place[0]:#x}.{place[1]} {place[2]}"
            missing += [f"{name} {bit}" for bit in range(32) if bits >> bit & 1]
        deadline = _bits(saved, (1, 0, "ecx")) & _TSC_DEADLINE
        if deadline and not vcpu.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"):
            missing.append("0x1.0 ecx 24")
        if missing:
            raise HostFeatureError(
                f"this host lacks features of the saved machine (cpuid bits {', '.join(missing)})",
                "restore it on a host that has them, with the same kernel or a newer one",
            )


def _bits(entries: Sequence[CpuidEntry], place: tuple[int, int, str]) -> int:
    leaf, index, register = place
    found = find_leaf(entries, leaf, index)
    return int(getattr(found, register)) if found else 0


def _vendor(entries: Sequence[CpuidEntry]) -> str:
    """Return the maker's name (SDM vol. 2A, CPUID leaf 0)."""
    leaf = find_leaf(entries, 0)
    if leaf is None:
        return "no known processor"
    name = b"".join(word.to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))
    return name.decode("ascii", "replace")
