"""T17, T18, T27, controls: a guest with contexts without the kernel's filters.

The guest sees the unchecked features, and enables those that the emulated processor has.
"""

from collections.abc import Iterator

import pytest

from pykvm.elisa.hidden_features import HIDDEN_FEATURES, HiddenFeature
from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import CpuidEntry, Kvm
from pykvm.machine.bare.guest import BareGuest
from tests.rigs.attacks.weaken import Weaken, weakened
from tests.rigs.hidden_features import (
    FEATURE_CONTROL,
    HIDDEN_CR4,
    HIDDEN_MSRS,
    VMX_BASIC,
    VMX_ENABLED,
    leaves_with,
)
from tests.rigs.probe import Probe, Step, What, faults, give, probe_guest, results, run
from tests.rigs.processor_features import host_levels
from tests.rigs.processor_modes import CR4, try_call

pytestmark = [pytest.mark.elisa, pytest.mark.weakened]

REGISTERS = ("eax", "ebx", "ecx", "edx")
DEBUG_CONTROL = 0x1D9
COUNTERS = 0xA
UNKNOWN = CpuidEntry(7, 3, flags=1, ecx=1 << 17)


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    """Guest with contexts that may have every feature of this KVM."""
    with weakened(Weaken.FEATURES), BareGuest(kvm, Probe()) as guest:
        guest.vcpu.set_cpuid2(kvm.get_supported_cpuid())
        yield guest


@pytest.mark.control("T17")
@pytest.mark.control("T18")
@pytest.mark.control("T27")
@pytest.mark.parametrize("feature", HIDDEN_FEATURES, ids=lambda feature: str(feature.name))
def test_the_guest_sees_it(kvm: Kvm, guest: BareGuest, feature: HiddenFeature) -> None:
    guest.vcpu.set_cpuid2(leaves_with(kvm, feature))
    which = REGISTERS.index(feature.register)
    give(guest, Step(What.CPUID, feature.function, feature.index, which))
    assert run(guest) == []
    (value,) = results(guest)
    assert value is not None
    assert value >> feature.bit & 1


@pytest.mark.control("T34")
def test_counters_are_offered(kvm: Kvm, guest: BareGuest) -> None:
    leaves = [leaf for leaf in kvm.get_supported_cpuid() if leaf.function != COUNTERS]
    guest.vcpu.set_cpuid2([*leaves, CpuidEntry(COUNTERS, 0, eax=2 | 8 << 8 | 48 << 16)])
    give(guest, Step(What.CPUID, COUNTERS, 0, 0))
    assert run(guest) == []
    (value,) = results(guest)
    assert (value or 0) & 0xFF == 2


@pytest.mark.control("T35")
def test_what_nobody_knows_yet_is_offered(kvm: Kvm, guest: BareGuest) -> None:
    """A bit of leaf 7 that has no meaning yet."""
    leaves = [leaf for leaf in kvm.get_supported_cpuid() if leaf.function != 7]
    guest.vcpu.set_cpuid2([*leaves, CpuidEntry(7, 0, flags=1, eax=3), UNKNOWN])
    give(guest, Step(What.CPUID, 7, UNKNOWN.index, 2))
    assert run(guest) == []
    assert results(guest) == [UNKNOWN.ecx]


def turn_on(guest: BareGuest, *names: str) -> list[int]:
    """Return the bits of CR4 that the guest has afterwards, besides its former ones."""
    tries = [Step(What.WRITE_CONTROL, 4, CR4 | 1 << HIDDEN_CR4[name]) for name in names]
    give(guest, *(step for each in tries for step in (each, Step(What.READ_CONTROL, 4))))
    assert run(guest) == []
    return [(value or 0) ^ CR4 for value in results(guest)[1::2]]


@pytest.mark.control("T27")
def test_pcid_is_turned_on(guest: BareGuest) -> None:
    """With PCID, changes of CR3 need not flush."""
    assert turn_on(guest, "PCIDE") == [1 << HIDDEN_CR4["PCIDE"]]


@pytest.mark.control("T18")
def test_the_guest_turns_on_what_the_processor_has(kvm: Kvm, guest: BareGuest) -> None:
    offered = {
        feature.name for feature in HIDDEN_FEATURES if feature.is_in(kvm.get_supported_cpuid())
    }
    needs = {"PKE": "pku", "VMXE": "vmx", "CET": "shstk", "PKS": "pks", "FRED": "fred"}
    names = [bit for bit, name in needs.items() if name in offered]
    assert "VMXE" in names
    assert turn_on(guest, *names) == [1 << HIDDEN_CR4[name] for name in names]


@pytest.mark.control("T17")
@pytest.mark.control("T18")
@pytest.mark.processor("PKE", "CET", "PKS", "UINTR")
@pytest.mark.parametrize("name", ["PKE", "CET", "PKS", "UINTR"])
def test_the_processor_takes_what_kvm_does_not_know(
    kvm: Kvm, counter: ObjectInstance, name: str
) -> None:
    """A guest that may write these bits without an exit has them enabled, and crosses with them.

    Of these features KVM offers only protection keys for user pages.
    """
    bit = 1 << HIDDEN_CR4[name]
    with (
        weakened(Weaken.FEATURES | Weaken.CR4),
        probe_guest(kvm, levels=host_levels()) as guest,
    ):
        guest.vcpu.set_cpuid2(kvm.get_supported_cpuid())
        own = guest.vcpu.get_sregs().cr4
        give(
            guest,
            Step(What.WRITE_CONTROL, 4, own | bit, attempt=True),
            Step(What.READ_CONTROL, 4),
            try_call(counter.attach(guest).slot),
            Step(What.READ_CONTROL, 4),
        )
        assert run(guest) == []
        assert faults(guest) == [None] * 4
        assert results(guest)[1:] == [own | bit, 1, own | bit]


@pytest.mark.control("T18")
def test_the_guest_may_be_a_hypervisor(guest: BareGuest) -> None:
    guest.vcpu.set_msrs({FEATURE_CONTROL: VMX_ENABLED})
    give(
        guest,
        Step(What.READ_MSR, VMX_BASIC, attempt=True),
        Step(What.READ_MSR, FEATURE_CONTROL, attempt=True),
    )
    assert run(guest) == []
    assert faults(guest) == [None] * 2
    assert results(guest)[1] == VMX_ENABLED


@pytest.mark.control("T17")
def test_debug_control_is_written(guest: BareGuest) -> None:
    """The guest enables branch records and single steps by branches.

    KVM accepts these bits from a guest without contexts.
    """
    values = [HIDDEN_MSRS[name][1] for name in ("IA32_DEBUGCTL.LBR", "IA32_DEBUGCTL.BTF")]
    give(guest, *(Step(What.WRITE_MSR, DEBUG_CONTROL, value, attempt=True) for value in values))
    assert run(guest) == []
    assert faults(guest) == [None] * 2
