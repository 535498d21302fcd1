"""Processor features that no VM with contexts may have.

The patched kernel refuses them: KVM_SET_CPUID2 fails with EINVAL once contexts are enabled.
`without_hidden_features` takes them out of a guest's CPUID.

`HIDDEN_FEATURES` are known, each with its reason: they write memory for the guest without regard to
the EPT's permissions, change how addresses or accesses are checked, or move control, and nobody has
checked them together with contexts. Leaf 7, where new processors announce what is new, has in
`CHECKED_LEAF_7` a list of what a guest may have: everything else is hidden as well.

Source: kernel-patches/README.md; SDM vol. 2A, CPUID; vol. 1, 13.1 for state components.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pykvm.kvm import CpuidEntry

__all__ = ["CHECKED_LEAF_7", "HIDDEN_FEATURES", "HiddenFeature", "without_hidden_features"]


@dataclass(frozen=True, slots=True)
class HiddenFeature:
    """One bit of a CPUID leaf.

    Attributes:
        name: as Linux names it.
        function: EAX of the instruction.
        index: ECX of the instruction.
        register: "eax", "ebx", "ecx" or "edx".
        bit: its number there.
        reason: why contexts do without it.
        states: components of XSAVE state that make no sense without it, of XCR0 (user) and of
            IA32_XSS (supervisor) alike.
    """

    name: str
    function: int
    index: int
    register: str
    bit: int
    reason: str
    states: tuple[int, ...] = ()

    def is_in(self, entries: Iterable[CpuidEntry]) -> bool:
        """Return whether these leaves offer it."""
        return any(
            getattr(entry, self.register) >> self.bit & 1
            for entry in entries
            if (entry.function, entry.index) == (self.function, self.index)
        )


_WRITES = "the processor writes records to guest addresses, in whatever context it is"
_STACKS = "the processor pushes return addresses of trusted code onto a stack of the guest's"
_STALE = "CR3 could change without a flush, so that what it names is not what is walked"
_ABORTS = "nothing says which EPT is active behind the abort of a transaction"
_KEYS = "keys of the guest's own decide what trusted code may read and write"

HIDDEN_FEATURES: Final = (
    HiddenFeature("dtes64", 1, 0, "ecx", 2, _WRITES),
    HiddenFeature("ds_cpl", 1, 0, "ecx", 4, _WRITES),
    HiddenFeature("vmx", 1, 0, "ecx", 5, "a nested hypervisor would have EPTs of its own"),
    HiddenFeature("smx", 1, 0, "ecx", 6, "GETSEC leaves the mode that contexts are built for"),
    HiddenFeature("pdcm", 1, 0, "ecx", 15, "leads to PEBS: " + _WRITES),
    HiddenFeature("pcid", 1, 0, "ecx", 17, _STALE),
    HiddenFeature("ds", 1, 0, "edx", 21, "PEBS and BTS: " + _WRITES),
    HiddenFeature("sgx", 7, 0, "ebx", 2, "enclaves are entered and left at addresses of their own"),
    HiddenFeature("hle", 7, 0, "ebx", 4, _ABORTS),
    HiddenFeature("invpcid", 7, 0, "ebx", 10, "comes with pcid"),
    HiddenFeature("rtm", 7, 0, "ebx", 11, _ABORTS),
    HiddenFeature(
        "mpx", 7, 0, "ebx", 14, "branches read bounds tables of the guest's", states=(3, 4)
    ),
    HiddenFeature("intel_pt", 7, 0, "ebx", 25, "traces what trusted code does", states=(8,)),
    HiddenFeature("pku", 7, 0, "ecx", 3, _KEYS, states=(9,)),
    HiddenFeature("shstk", 7, 0, "ecx", 7, _STACKS, states=(11, 12)),
    HiddenFeature("key_locker", 7, 0, "ecx", 23, "encrypts with keys that KVM does not switch"),
    HiddenFeature("bus_lock_detect", 7, 0, "ecx", 24, "needs DEBUGCTL, which is refused"),
    HiddenFeature("enqcmd", 7, 0, "ecx", 29, "devices take work from whoever runs", states=(10,)),
    HiddenFeature("sgx_lc", 7, 0, "ecx", 30, "comes with sgx"),
    HiddenFeature("pks", 7, 0, "ecx", 31, _KEYS),
    HiddenFeature("uintr", 7, 0, "edx", 5, "interrupts that KVM does not hold", states=(14,)),
    HiddenFeature("arch_lbr", 7, 0, "edx", 19, "records where trusted code branches", states=(15,)),
    HiddenFeature(
        "ibt", 7, 0, "edx", 20, "trusted code has no ENDBR at its entries", states=(11, 12)
    ),
    HiddenFeature("lass", 7, 1, "eax", 6, "the upper half of addresses is refused by mode"),
    HiddenFeature("fred", 7, 1, "eax", 17, "events go by MSRs, not by the checked tables"),
    HiddenFeature("lkgs", 7, 1, "eax", 18, "comes with fred"),
    HiddenFeature("lam", 7, 1, "eax", 26, "addresses with tags pass no check of canonical form"),
    HiddenFeature("user_msr", 7, 1, "edx", 15, "a process writes MSRs"),
    HiddenFeature("avx10", 7, 1, "edx", 19, "has a version, and leaves of its own"),
    HiddenFeature(
        "apx", 7, 1, "edx", 21, "a new prefix makes other instructions of bytes", states=(19,)
    ),
)
"""In the order of leaves and bits."""

_ALL: Final = 0xFFFF_FFFF

CHECKED_LEAF_7: Final[tuple[dict[str, int], ...]] = (
    {"eax": _ALL, "ebx": 0xFDBF_23EB, "ecx": 0x1A41_5F67, "edx": 0xBFC0_CD1C},
    {"eax": 0x00A0_1CB7, "ebx": 0, "ecx": 0, "edx": 0x0000_4530},
    {"eax": 0, "ebx": 0, "ecx": 0, "edx": 0x0000_003F},
)
"""Bits of leaf 7 that a guest may have, by index and register; none of further indices.

The kernel's table, which names the bits: elisa_leaf7 in
kernel-patches/files/arch/x86/kvm/vmx/elisa.c.
"""

_FEATURES: Final = 7
_COUNTERS: Final = 0xA
_XSAVE: Final = 0xD
_STATES: Final = 0x6_00E7  # x87, SSE, AVX, AVX-512, AMX


def without_hidden_features(entries: Iterable[CpuidEntry]) -> list[CpuidEntry]:
    """Return the same leaves without what is hidden, and without its XSAVE state components.

    There are no performance counters: they would count what trusted code does.
    """
    states = {state for feature in HIDDEN_FEATURES for state in feature.states}
    result = []
    for entry in entries:
        if entry.function == _XSAVE and entry.index in states:
            continue
        changed = replace(entry)
        for feature in HIDDEN_FEATURES:
            if (entry.function, entry.index) == (feature.function, feature.index):
                kept = getattr(changed, feature.register) & ~(1 << feature.bit)
                setattr(changed, feature.register, kept)
        if entry.function == _FEATURES:
            _keep(changed, CHECKED_LEAF_7[entry.index] if entry.index < len(CHECKED_LEAF_7) else {})
        if entry.function == _COUNTERS:
            _keep(changed, {})
        if entry.function == _XSAVE and entry.index == 0:
            _keep(changed, {"eax": _STATES, "ebx": _ALL, "ecx": _ALL})
        if entry.function == _XSAVE and entry.index == 1:
            changed.ecx &= ~sum(1 << state for state in states)
        result.append(changed)
    return result


def _keep(entry: CpuidEntry, masks: Mapping[str, int]) -> None:
    for register in ("eax", "ebx", "ecx", "edx"):
        setattr(entry, register, getattr(entry, register) & masks.get(register, 0))
