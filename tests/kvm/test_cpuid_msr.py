"""pykvm.kvm.cpuid and pykvm.kvm.msr: tables of leaves and registers, and the MSR filter."""

import dataclasses

import pytest

from pykvm.kvm import (
    CpuidEntry,
    Hlt,
    Io,
    MsrError,
    MsrRange,
    Rdmsr,
    Wrmsr,
    find_leaf,
    lib,
)
from pykvm.kvm.msr import pack_msr_filter
from tests.rigs.needs import need
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.kvm

MTRR_DEF_TYPE = 0x2FF
SYSENTER_EIP = 0x176
UNKNOWN_MSR = 0x4321


# ---- CPUID --------------------------------------------------------------------------------------


@pytest.mark.unit
def test_find_leaf() -> None:
    indexed = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    leaves = [
        CpuidEntry(0, eax=4),
        CpuidEntry(4, 0, indexed, eax=1),
        CpuidEntry(4, 1, indexed, eax=2),
    ]
    assert find_leaf(leaves, 4, 1) is leaves[2]
    assert find_leaf(leaves, 4, 2) is None
    assert find_leaf(leaves, 0, 9) is leaves[0]  # ECX does not count there
    assert str(leaves[2]) == "0x00000004.1 eax=00000002 ebx=00000000 ecx=00000000 edx=00000000"


def test_set_and_get(guest: RealModeGuest) -> None:
    leaves = guest.vm.kvm.supported_cpuid()
    guest.vcpu.set_cpuid(leaves)
    assert [leaf.function for leaf in guest.vcpu.get_cpuid()] == [leaf.function for leaf in leaves]


def test_the_guest_sees_it(guest: RealModeGuest) -> None:
    leaves = guest.vm.kvm.supported_cpuid()
    mine = CpuidEntry(0x40000000, eax=0x40000000, ebx=0x4B594C45, ecx=0x1234)
    leaves = [leaf for leaf in leaves if leaf.function < 0x40000000] + [mine]
    guest.vcpu.set_cpuid(leaves)
    guest.load("""
        66 B8 00 00 00 40  ; mov eax, 0x40000000
        0F A2              ; cpuid
        66 89 1E 00 60     ; mov [0x6000], ebx
        F4                 ; hlt
    """)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6004] == b"ELYK"


def test_many_leaves_are_read_back(guest: RealModeGuest) -> None:
    """More than the first guess of the reader."""
    leaves = [CpuidEntry(0x50000000 + number, eax=number) for number in range(100)]
    guest.vcpu.set_cpuid(leaves)
    found = guest.vcpu.get_cpuid()
    assert [dataclasses.astuple(leaf) for leaf in found] == [
        dataclasses.astuple(leaf) for leaf in leaves
    ]


# ---- MSRs ---------------------------------------------------------------------------------------


def test_msr_round_trip(guest: RealModeGuest) -> None:
    guest.vcpu.set_msrs({SYSENTER_EIP: 0xFFFF800000001234, 0xC0000082: 0xFFFF800000005678})
    assert guest.vcpu.get_msrs([0xC0000082, SYSENTER_EIP]) == {
        0xC0000082: 0xFFFF800000005678,
        SYSENTER_EIP: 0xFFFF800000001234,
    }
    assert guest.vcpu.get_msrs([]) == {}


def test_every_listed_msr_is_read_or_named(guest: RealModeGuest) -> None:
    guest.vcpu.set_cpuid(guest.vm.kvm.supported_cpuid())
    wanted = guest.vm.kvm.msr_index_list()
    refused = []
    for index in wanted:
        try:
            guest.vcpu.get_msrs([index])
        except MsrError as error:
            refused.append((index, error.index))
    assert all(index == named for index, named in refused)
    assert len(refused) < len(wanted) // 2


def test_unknown_msr(guest: RealModeGuest) -> None:
    with pytest.raises(MsrError, match=r"does not read msr 0x4321: use a number of") as caught:
        guest.vcpu.get_msrs([SYSENTER_EIP, UNKNOWN_MSR])
    assert caught.value.index == UNKNOWN_MSR
    with pytest.raises(MsrError, match=r"does not write 0x7 to msr 0x4321") as caught:
        guest.vcpu.set_msrs({SYSENTER_EIP: 1, UNKNOWN_MSR: 7})
    assert caught.value.index == UNKNOWN_MSR
    assert guest.vcpu.get_msrs([SYSENTER_EIP]) == {SYSENTER_EIP: 1}  # those before it are set


READ_MSR = """
    66 B9 76 01 00 00  ; mov ecx, 0x176
    0F 32              ; rdmsr
    66 A3 00 60        ; mov [0x6000], eax
    0F 30              ; wrmsr
    F4                 ; hlt
"""


def test_filtered_msrs_leave_to_user_space(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_X86_MSR_FILTER")
    guest.vm.enable_user_msrs()
    guest.vm.set_msr_filter([MsrRange(SYSENTER_EIP - 2, [True, True, False, True])])
    guest.load(READ_MSR)
    assert run(guest.vcpu) == Rdmsr(SYSENTER_EIP, lib.KVM_MSR_EXIT_REASON_FILTER)
    guest.vcpu.reply(0x1122334455667788)
    assert run(guest.vcpu) == Wrmsr(
        SYSENTER_EIP, 0x1122334455667788, lib.KVM_MSR_EXIT_REASON_FILTER
    )
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6004] == b"\x88\x77\x66\x55"


def test_filtered_msr_faults_on_request(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_X86_MSR_FILTER")
    guest.memory[13 * 4 : 13 * 4 + 4] = b"\x00\x20\x00\x00"  # #GP
    guest.load("B0 47 E6 10 F4 ; mov al, 'G'; out 0x10, al; hlt", at=0x2000)
    guest.vm.enable_user_msrs()
    guest.vm.set_msr_filter([MsrRange(SYSENTER_EIP, [False])])
    guest.load(READ_MSR)
    assert isinstance(run(guest.vcpu), Rdmsr)
    guest.vcpu.reply_fault()
    assert run(guest.vcpu) == Io(0x10, 1, 1, True, b"G")


def test_filter_removed(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_X86_MSR_FILTER")
    guest.vm.enable_user_msrs()
    guest.vm.set_msr_filter([MsrRange(SYSENTER_EIP, [False])])
    guest.vm.set_msr_filter([])
    guest.load(READ_MSR)
    assert run(guest.vcpu) == Hlt()


def test_unknown_msr_of_the_guest(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_X86_USER_SPACE_MSR")
    guest.vm.enable_user_msrs()
    guest.load("""
        66 B9 21 43 00 00  ; mov ecx, 0x4321
        0F 32              ; rdmsr
        F4                 ; hlt
    """)
    found = run(guest.vcpu)
    assert isinstance(found, Rdmsr)
    assert found.index == UNKNOWN_MSR
    assert found.why in (lib.KVM_MSR_EXIT_REASON_UNKNOWN, lib.KVM_MSR_EXIT_REASON_INVAL)


@pytest.mark.unit
def test_filter_shapes() -> None:
    packed, bitmaps = pack_msr_filter(
        [MsrRange(0x100, [True] + [False] * 7 + [False, True], write=False)], default_allow=False
    )
    assert packed.flags == lib.KVM_MSR_FILTER_DEFAULT_DENY
    assert (packed.ranges[0].base, packed.ranges[0].nmsrs) == (0x100, 10)
    assert packed.ranges[0].flags == lib.KVM_MSR_FILTER_READ
    assert list(bitmaps[0]) == [1, 2]
    with pytest.raises(MsrError, match="empty"):
        pack_msr_filter([MsrRange(0x100, [])], default_allow=True)
    with pytest.raises(MsrError, match="at most 16"):
        pack_msr_filter([MsrRange(n, [True]) for n in range(17)], default_allow=True)


def test_pmu_event_filter(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_PMU_EVENT_FILTER")
    guest.vm.set_pmu_event_filter([0x3C, 0xC0], allow=True)
    guest.vm.set_pmu_event_filter([], allow=False)
