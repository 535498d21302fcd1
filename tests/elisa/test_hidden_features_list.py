"""List of the features hidden from VMs with contexts, and CPUID leaves without them."""

import pytest

from pykvm.elisa.hidden_features import HIDDEN_FEATURES, without_hidden_features
from pykvm.kvm import CpuidEntry, Kvm

KVM_CPUID_FLAG_SIGNIFICANT_INDEX = 1
ALL = 0xFFFF_FFFF


def full(function: int, index: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, KVM_CPUID_FLAG_SIGNIFICANT_INDEX, ALL, ALL, ALL, ALL)


@pytest.mark.attack("T18")
@pytest.mark.unit
def test_each_feature_goes_and_nothing_else() -> None:
    before = [full(1), full(7), full(7, 1), full(0x8000_0001)]
    after = without_hidden_features(before)
    assert before == [full(1), full(7), full(7, 1), full(0x8000_0001)]  # unchanged
    for feature in HIDDEN_FEATURES:
        assert feature.is_in(before)
        assert not feature.is_in(after)
    gone = sum(
        (ALL ^ getattr(entry, register)).bit_count()
        for entry in after
        for register in ("eax", "ebx", "ecx", "edx")
    )
    assert gone == len(HIDDEN_FEATURES)
    assert len({(f.function, f.index, f.register, f.bit) for f in HIDDEN_FEATURES}) == gone


@pytest.mark.unit
def test_reasons() -> None:
    assert all(len(feature.reason) > 10 for feature in HIDDEN_FEATURES)


@pytest.mark.unit
def test_state_components() -> None:
    """SDM vol. 1, 13.1: MPX 3 and 4, PT 8, PKRU 9, CET 11 and 12, UINTR 14, LBR 15."""
    before = [full(0xD, index) for index in range(20)]
    after = {entry.index: entry for entry in without_hidden_features(before)}
    gone = {3, 4, 8, 9, 11, 12, 14, 15}
    assert set(after) == set(range(20)) - gone
    mask = sum(1 << state for state in gone)
    assert (after[0].eax, after[1].ecx) == (ALL ^ mask, ALL ^ mask)
    assert (after[0].ebx, after[1].eax, after[1].ebx) == (ALL, ALL, ALL)
    assert after[2] == full(0xD, 2)


@pytest.mark.attack("T17")
@pytest.mark.kvm
def test_of_this_kvm(kvm: Kvm) -> None:
    offered = kvm.get_supported_cpuid()
    left = without_hidden_features(offered)
    assert not [feature.name for feature in HIDDEN_FEATURES if feature.is_in(left)]
    with kvm.create_vm() as vm:
        vm.create_vcpu(0).set_cpuid2(left)
