"""VMs with contexts lack the features that nobody has checked together with contexts.

Neither the VMM nor the guest can enable them there. Other VMs are unaffected.
"""

import errno
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pykvm.elisa import calls
from pykvm.elisa.hidden_features import (
    CHECKED_LEAF_7,
    HIDDEN_FEATURES,
    HiddenFeature,
    without_hidden_features,
)
from pykvm.elisa.objects import ObjectInstance
from pykvm.kvm import CpuidEntry, IoctlError, Kvm, MsrError, Vcpu, Vm
from pykvm.machine.bare.guest import BareGuest
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

pytestmark = pytest.mark.elisa

SIGNIFICANT_INDEX = 1 << 0  # Linux, arch/x86/include/uapi/asm/kvm.h
GENERAL_PROTECTION = 13


def set_cpuid(vm: Vm, entries: list[CpuidEntry]) -> int:
    return give_leaves(vm.create_vcpu(0), entries)


def give_leaves(vcpu: Vcpu, entries: list[CpuidEntry]) -> int:
    try:
        vcpu.set_cpuid2(entries)
    except IoctlError as error:
        return -(error.errno or 0)
    return 0


@pytest.mark.attack("T17")
@pytest.mark.attack("T18")
@pytest.mark.attack("T27")
@pytest.mark.parametrize("feature", HIDDEN_FEATURES, ids=lambda feature: str(feature.name))
def test_cpuid(kvm: Kvm, feature: HiddenFeature) -> None:
    """The leaves are refused with contexts; without contexts KVM takes them."""
    entries = leaves_with(kvm, feature)
    for enable, expected in ((True, -errno.EINVAL), (False, 0)):
        with kvm.create_vm() as vm:
            if enable:
                calls.enable_contexts(vm)
            assert set_cpuid(vm, entries) == expected


@pytest.mark.parametrize("feature", HIDDEN_FEATURES, ids=lambda feature: str(feature.name))
def test_cpuid_under_another_index(kvm: Kvm, feature: HiddenFeature) -> None:
    """KVM applies an entry to any index unless a flag says that the index is significant.

    For leaf 1 it always does. Of leaf 7 further indices are refused in any case.
    """
    plain = without_hidden_features(kvm.get_supported_cpuid())
    odd = CpuidEntry(feature.function, 9, flags=0, **{feature.register: 1 << feature.bit})
    for entry in (odd, replace(odd, flags=SIGNIFICANT_INDEX)):
        with kvm.create_vm() as vm:
            calls.enable_contexts(vm)
            assert set_cpuid(vm, [entry, *plain]) == -errno.EINVAL, entry


REGISTERS = ("eax", "ebx", "ecx", "edx")


@pytest.mark.attack("T35")
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("register", REGISTERS)
def test_leaf_7_by_what_is_allowed(kvm: Kvm, index: int, register: str) -> None:
    """Each bit of leaf 7 that is not on the list is refused by itself; the rest is taken."""
    allowed = CHECKED_LEAF_7[index] if index < len(CHECKED_LEAF_7) else {}
    mask = allowed.get(register, 0)
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        vcpu = vm.create_vcpu(0)
        for bit in range(32):
            entry = CpuidEntry(7, index, flags=SIGNIFICANT_INDEX, **{register: 1 << bit})
            expected = 0 if mask >> bit & 1 else -errno.EINVAL
            assert give_leaves(vcpu, [CpuidEntry(0, 0, eax=7), entry]) == expected, bit


@pytest.mark.attack("T35")
def test_state_components_by_what_is_allowed(kvm: Kvm) -> None:
    """APX is component 19; KVM lets a guest turn on what leaf 0xD offers."""
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        vcpu = vm.create_vcpu(0)
        for register, bit in [("eax", 8), ("eax", 10), ("eax", 19), ("eax", 31), ("edx", 0)]:
            entry = CpuidEntry(0xD, 0, flags=SIGNIFICANT_INDEX, **{register: 1 << bit})
            with pytest.raises(IoctlError) as caught:
                vcpu.set_cpuid2([entry])
            assert caught.value.errno == errno.EINVAL, bit


# ---- performance counters ------------------------------------------------------------------------

COUNTERS = 0xA
EVENT_SELECT, COUNT = 0x186, 0xC1  # IA32_PERFEVTSEL0, IA32_PMC0
INSTRUCTIONS = 0x43_00C0  # retired, at every privilege level, enabled


@pytest.mark.attack("T34")
@pytest.mark.parametrize("version", [1, 2, 5])
def test_counters_by_the_vmm(kvm: Kvm, version: int) -> None:
    for enable, expected in ((True, -errno.EINVAL), (False, 0)):
        plain = without_hidden_features(kvm.get_supported_cpuid())
        entries = [entry for entry in plain if entry.function != COUNTERS]
        entries.append(CpuidEntry(COUNTERS, 0, eax=version | 8 << 8 | 48 << 16))
        with kvm.create_vm() as vm:
            if enable:
                calls.enable_contexts(vm)
            assert set_cpuid(vm, entries) == expected


@pytest.mark.attack("T34")
def test_counters_by_the_guest(guest: BareGuest) -> None:
    """None is offered, and what is programmed all the same does not count."""
    give(
        guest,
        Step(What.CPUID, COUNTERS, 0, 0),
        Step(What.WRITE_MSR, EVENT_SELECT, INSTRUCTIONS, attempt=True),
        Step(What.READ_MSR, COUNT, attempt=True),
        Step(What.READ_MSR, COUNT, attempt=True),
    )
    assert run(guest) == []
    version, _, first, second = results(guest)
    assert version == 0
    assert not first
    assert not second


def test_refused_leaves_change_nothing(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        calls.enable_contexts(vm)
        vcpu = vm.create_vcpu(0)
        good = without_hidden_features(kvm.get_supported_cpuid())
        vcpu.set_cpuid2(good)
        before = vcpu.get_cpuid2()
        for feature in HIDDEN_FEATURES:
            with pytest.raises(IoctlError):
                vcpu.set_cpuid2(leaves_with(kvm, feature))
        assert vcpu.get_cpuid2() == before


def test_what_the_guest_sees(kvm: Kvm) -> None:
    """The guest's own CPUID instruction shows no hidden feature."""
    steps = [
        Step(What.CPUID, f.function, f.index, ("eax", "ebx", "ecx", "edx").index(f.register))
        for f in HIDDEN_FEATURES
    ]
    with BareGuest(kvm, Probe()) as guest:
        give(guest, *steps)
        assert run(guest) == []
        for feature, value in zip(HIDDEN_FEATURES, results(guest), strict=True):
            assert value is not None
            assert not value >> feature.bit & 1, feature.name


# ---- by the guest's own instructions -------------------------------------------------------------


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[BareGuest]:
    with BareGuest(kvm, Probe()) as guest:
        yield guest


@pytest.mark.attack("T18")
@pytest.mark.attack("T27")
def test_control_register(guest: BareGuest) -> None:
    """Each bit is reserved: #GP, and CR4 stays unchanged."""
    tries = [
        Step(What.WRITE_CONTROL, 4, CR4 | 1 << bit, attempt=True) for bit in HIDDEN_CR4.values()
    ]
    give(guest, *tries, Step(What.READ_CONTROL, 4))
    assert run(guest) == []
    assert faults(guest) == [GENERAL_PROTECTION] * len(tries) + [None]
    assert results(guest)[-1] == CR4


@pytest.mark.attack("T17")
@pytest.mark.attack("T18")
@pytest.mark.processor("PKE", "CET", "PKS", "UINTR")
def test_features_that_this_processor_has(kvm: Kvm, counter: ObjectInstance) -> None:
    """The processor would take each of these bits. The guest is refused all, and still crosses."""
    with probe_guest(kvm, levels=host_levels()) as guest:
        own = guest.vcpu.get_sregs().cr4
        names = ("PKE", "CET", "PKS", "UINTR")
        tries = [
            Step(What.WRITE_CONTROL, 4, own | 1 << HIDDEN_CR4[name], attempt=True) for name in names
        ]
        slot = counter.attach(guest).slot
        give(guest, *tries, Step(What.READ_CONTROL, 4), try_call(slot))
        assert run(guest) == []
        assert faults(guest) == [GENERAL_PROTECTION] * len(names) + [None] * 2
        assert results(guest)[-2:] == [own, 1]


def test_control_register_by_the_vmm(guest: BareGuest) -> None:
    for name, bit in HIDDEN_CR4.items():
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 |= 1 << bit
        with pytest.raises(IoctlError) as caught:
            guest.vcpu.set_sregs(sregs)
        assert caught.value.errno == errno.EINVAL, name
    assert guest.vcpu.get_sregs().cr4 == CR4


@pytest.mark.attack("T17")
def test_msrs(guest: BareGuest) -> None:
    """Writing a value that enables something raises #GP."""
    tries = [
        Step(What.WRITE_MSR, index, value, attempt=True) for index, value in HIDDEN_MSRS.values()
    ]
    give(guest, *tries)
    assert run(guest) == []
    assert dict(zip(HIDDEN_MSRS, faults(guest), strict=True)) == dict.fromkeys(
        HIDDEN_MSRS, GENERAL_PROTECTION
    )


@pytest.mark.attack("T17")
def test_debug_control_stays_zero(guest: BareGuest) -> None:
    """Zero may be written, as Linux does during its start."""
    give(
        guest,
        Step(What.WRITE_MSR, 0x1D9, 0, attempt=True),
        Step(What.READ_MSR, 0x1D9, attempt=True),
    )
    assert run(guest) == []
    assert faults(guest) == [None, None]
    assert results(guest)[1] == 0


# ---- nested VMX ----------------------------------------------------------------------------------


@pytest.mark.attack("T18")
def test_no_nested_vmx(guest: BareGuest) -> None:
    """There are no capability MSRs and no CR4.VMXE (above), so no VMXON; the VMM cannot add any."""
    give(
        guest,
        Step(What.READ_MSR, VMX_BASIC, attempt=True),
        Step(What.WRITE_MSR, FEATURE_CONTROL, VMX_ENABLED, attempt=True),
    )
    assert run(guest) == []
    assert faults(guest) == [GENERAL_PROTECTION] * 2


def test_no_nested_state(kvm: Kvm, guest: BareGuest) -> None:
    """KVM_SET_NESTED_STATE of a hypervisor that has executed VMXON is refused.

    Fields of struct kvm_nested_state: flags, format, size, vmxon_pa, vmcs12_pa (api.rst 4.119).
    """
    if not guest.vm.check_extension("KVM_CAP_NESTED_STATE"):
        pytest.skip("this kvm has no nested state: kvm_intel.nested=0")
    none = (2**64 - 1).to_bytes(8, "little")
    head = (0).to_bytes(2, "little") + (0).to_bytes(2, "little") + (128).to_bytes(4, "little")
    vmxon = head + (0x1000).to_bytes(8, "little") + none + bytes(104)
    with pytest.raises(IoctlError) as caught:
        guest.vcpu.set_nested_state(vmxon)
    assert caught.value.errno == errno.EINVAL
    # Control: a VM without contexts, whose CPUID has VMX, takes the same state.
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        try:
            vcpu.set_msrs({FEATURE_CONTROL: VMX_ENABLED})
        except MsrError:
            pytest.skip("this kvm offers no nested vmx at all")
        sregs = vcpu.get_sregs()
        sregs.cr4 |= 1 << HIDDEN_CR4["VMXE"]
        vcpu.set_sregs(sregs)
        vcpu.set_nested_state(vmxon)
