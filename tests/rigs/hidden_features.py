"""CPUID bits and MSRs of features that a guest with contexts may not have."""

from dataclasses import replace

from pykvm.elisa.hidden_features import HiddenFeature, without_hidden_features
from pykvm.kvm import CpuidEntry, Kvm, find_leaf

HIDDEN_CR4 = {
    "VMXE": 13,
    "SMXE": 14,
    "PCIDE": 17,
    "PKE": 22,
    "CET": 23,
    "PKS": 24,
    "UINTR": 25,
    "LASS": 27,
    "LAM_SUP": 28,
    "FRED": 32,
}
# SDM vol. 4. The values mean something to these MSRs.
HIDDEN_MSRS = {
    "IA32_DEBUGCTL.LBR": (0x1D9, 1 << 0),
    "IA32_DEBUGCTL.BTF": (0x1D9, 1 << 1),
    "IA32_DEBUGCTL.TR": (0x1D9, 1 << 6),
    "IA32_DEBUGCTL.BTS": (0x1D9, 1 << 7),
    "IA32_PEBS_ENABLE": (0x3F1, 1),
    "IA32_RTIT_CTL": (0x570, 1),
    "IA32_DS_AREA": (0x600, 0x1000),
    "IA32_U_CET": (0x6A0, 1),
    "IA32_PL0_SSP": (0x6A4, 0x1000),
    "IA32_PKRS": (0x6E1, 1),
    "IA32_UINTR_MISC": (0x988, 1 << 39),
}

VMX_BASIC, FEATURE_CONTROL = 0x480, 0x3A
VMX_ENABLED = 5  # locked, VMXON outside SMX


def leaves_with(kvm: Kvm, feature: HiddenFeature) -> list[CpuidEntry]:
    """Return the CPUID leaves of KVM without the hidden features, except `feature`."""
    entries = without_hidden_features(kvm.get_supported_cpuid())
    leaf = find_leaf(entries, feature.function, feature.index)
    if leaf is None or (leaf.function, leaf.index) != (feature.function, feature.index):
        leaf = CpuidEntry(feature.function, feature.index, flags=1)
        entries.append(leaf)
        first = find_leaf(entries, feature.function)
        assert first is not None
        first.eax = max(first.eax, feature.index)  # raise the last subleaf
    value = getattr(leaf, feature.register) | 1 << feature.bit
    entries[entries.index(leaf)] = replace(leaf, **{feature.register: value})
    assert feature.is_in(entries)
    return entries
