"""pykvm.kvm.x86.system: CPUID and MSRs that this host can give to guests."""

from pathlib import Path

import pytest

from pykvm.kvm import Kvm, find_leaf
from tests.rigs.needs import need


@pytest.mark.kvm
def test_cpuid_of_the_host(kvm: Kvm) -> None:
    leaves = kvm.get_supported_cpuid()
    vendor = find_leaf(leaves, 0)
    assert vendor is not None
    name = b"".join(r.to_bytes(4, "little") for r in (vendor.ebx, vendor.edx, vendor.ecx))
    assert name.decode() in Path("/proc/cpuinfo").read_text()
    assert find_leaf(leaves, 0x7FFFFFFF) is None


@pytest.mark.kvm
def test_emulated_cpuid(kvm: Kvm) -> None:
    need(kvm, "KVM_CAP_EXT_EMUL_CPUID")
    assert all(0 <= leaf.eax < 2**32 for leaf in kvm.get_emulated_cpuid())


@pytest.mark.kvm
def test_msr_lists(kvm: Kvm) -> None:
    indices = kvm.get_msr_index_list()
    assert len(set(indices)) == len(indices)
    assert 0x10 in indices  # IA32_TIME_STAMP_COUNTER
    need(kvm, "KVM_CAP_GET_MSR_FEATURES")
    features = kvm.get_msr_feature_index_list()
    values = kvm.get_msrs()
    assert sorted(values) == sorted(features)
    assert kvm.get_msrs(features[:1]) == {features[0]: values[features[0]]}


@pytest.mark.kvm
def test_mce_capabilities(kvm: Kvm) -> None:
    need(kvm, "KVM_CAP_MCE")
    assert kvm.get_mce_cap_supported() & 0xFF <= 32  # banks
