"""List of the features hidden from VMs with contexts, and CPUID leaves without them."""

import pytest

from pykvm.elisa.hidden_features import (
    CHECKED_LEAF_7,
    HIDDEN_FEATURES,
    without_hidden_features,
)
from pykvm.kvm import CpuidEntry, Kvm

KVM_CPUID_FLAG_SIGNIFICANT_INDEX = 1
ALL = 0xFFFF_FFFF
REGISTERS = ("eax", "ebx", "ecx", "edx")


def full(function: int, index: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, KVM_CPUID_FLAG_SIGNIFICANT_INDEX, ALL, ALL, ALL, ALL)


@pytest.mark.attack("T18")
@pytest.mark.unit
def test_each_feature_goes_and_nothing_else_of_leaf_1() -> None:
    before = [full(1), full(7), full(7, 1), full(0x8000_0001)]
    after = without_hidden_features(before)
    assert before == [full(1), full(7), full(7, 1), full(0x8000_0001)]  # unchanged
    for feature in HIDDEN_FEATURES:
        assert feature.is_in(before)
        assert not feature.is_in(after)
    assert after[3] == before[3]
    named = [f for f in HIDDEN_FEATURES if f.function == 1]
    gone = sum((ALL ^ getattr(after[0], register)).bit_count() for register in REGISTERS)
    assert gone == len(named)
    places = {(f.function, f.index, f.register, f.bit) for f in HIDDEN_FEATURES}
    assert len(places) == len(HIDDEN_FEATURES)


@pytest.mark.attack("T35")
@pytest.mark.unit
def test_of_leaf_7_what_is_checked_stays() -> None:
    after = without_hidden_features([full(7, index) for index in range(5)])
    for index, entry in enumerate(after):
        allowed = CHECKED_LEAF_7[index] if index < len(CHECKED_LEAF_7) else {}
        for register in REGISTERS:
            assert getattr(entry, register) == allowed.get(register, 0), (index, register)


@pytest.mark.attack("T34")
@pytest.mark.unit
def test_no_performance_counters() -> None:
    (entry,) = without_hidden_features([full(0xA)])
    assert [getattr(entry, register) for register in REGISTERS] == [0] * 4


@pytest.mark.unit
def test_reasons() -> None:
    assert all(len(feature.reason) > 10 for feature in HIDDEN_FEATURES)


@pytest.mark.unit
def test_state_components() -> None:
    """SDM vol. 1, 13.1: MPX 3 and 4, PT 8, PKRU 9, PASID 10, CET 11 and 12, UINTR 14, LBR 15."""
    before = [full(0xD, index) for index in range(20)]
    after = {entry.index: entry for entry in without_hidden_features(before)}
    gone = {3, 4, 8, 9, 10, 11, 12, 14, 15, 19}
    assert set(after) == set(range(20)) - gone
    assert (after[0].eax, after[0].edx) == (0b110_0000_0000_1110_0111, 0)  # and AMX 17 and 18
    assert after[1].ecx == ALL ^ sum(1 << state for state in gone)
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
