"""pykvm.kvm.x86.msr: registers that are read and written, and the filter."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pykvm.kvm import (
    Hlt,
    Io,
    Kvm,
    MsrError,
    MsrFilterError,
    MsrRange,
    Rdmsr,
    Struct,
    Wrmsr,
    lib,
)
from pykvm.kvm.x86.msr import (
    MOST_IN_A_CALL,
    MOST_IN_A_RANGE,
    pack_msr_filter,
    write_msrs,
)
from tests.rigs.messages import one_line
from tests.rigs.needs import need
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.kvm

MTRR_DEF_TYPE = 0x2FF
SYSENTER_EIP = 0x176
UNKNOWN_MSR = 0x4321
EFER = 0xC0000080


def test_msr_round_trip(guest: RealModeGuest) -> None:
    guest.vcpu.set_msrs({SYSENTER_EIP: 0xFFFF800000001234, 0xC0000082: 0xFFFF800000005678})
    assert guest.vcpu.get_msrs([0xC0000082, SYSENTER_EIP]) == {
        0xC0000082: 0xFFFF800000005678,
        SYSENTER_EIP: 0xFFFF800000001234,
    }
    assert guest.vcpu.get_msrs([]) == {}


def test_every_listed_msr_is_read_or_named(guest: RealModeGuest) -> None:
    guest.vcpu.set_cpuid2(guest.vm.kvm.get_supported_cpuid())
    wanted = guest.vm.kvm.get_msr_index_list()
    refused = []
    for index in wanted:
        try:
            guest.vcpu.get_msrs([index])
        except MsrError as error:
            refused.append((index, error.index))
    assert all(index == named for index, named in refused)
    assert len(refused) < len(wanted) // 2


def test_unknown_msr(guest: RealModeGuest) -> None:
    with pytest.raises(MsrError, match=r"does not read msr 0x4321: use a number that") as caught:
        guest.vcpu.get_msrs([SYSENTER_EIP, UNKNOWN_MSR])
    assert caught.value.index == UNKNOWN_MSR
    one_line(caught.value)
    with pytest.raises(MsrError, match=r"does not write 0x7 to msr 0x4321") as caught:
        guest.vcpu.set_msrs({SYSENTER_EIP: 1, UNKNOWN_MSR: 7})
    assert caught.value.index == UNKNOWN_MSR
    assert "leave it out" in one_line(caught.value)
    assert guest.vcpu.get_msrs([SYSENTER_EIP]) == {SYSENTER_EIP: 1}  # those before it are set


def test_more_msrs_than_one_call_takes(guest: RealModeGuest) -> None:
    """KVM_GET_MSRS takes fewer than 256; callers do not see the split."""
    many = [SYSENTER_EIP, 0xC0000082] * 300
    guest.vcpu.set_msrs({SYSENTER_EIP: 0x1234, 0xC0000082: 0x5678})
    assert guest.vcpu.get_msrs(many) == {SYSENTER_EIP: 0x1234, 0xC0000082: 0x5678}
    assert len(guest.vcpu.get_msrs([0x10] * MOST_IN_A_CALL)) == 1
    with pytest.raises(MsrError, match="msr 0x4321") as caught:
        guest.vcpu.get_msrs([*many, UNKNOWN_MSR, SYSENTER_EIP])
    assert caught.value.index == UNKNOWN_MSR


@pytest.mark.unit
def test_writes_are_split_in_order() -> None:
    calls: list[int] = []
    written: list[tuple[int, int]] = []

    def write(table: Struct) -> int:
        calls.append(table.nmsrs)
        written.extend((table.entries[i].index, table.entries[i].data) for i in range(table.nmsrs))
        return int(table.nmsrs)

    values = {0x10000 + number: number for number in range(600)}
    write_msrs(write, write, values)
    assert calls == [MOST_IN_A_CALL, MOST_IN_A_CALL, 600 - 2 * MOST_IN_A_CALL]
    assert written == list(values.items())


def test_a_listed_msr_that_cannot_be_written(kvm: Kvm, guest: RealModeGuest) -> None:
    """Each listed MSR is read and written back; no error claims that the list lacks it."""
    guest.vcpu.set_cpuid2(kvm.get_supported_cpuid())
    steps = {
        "give the vcpu the feature it belongs to, with set_cpuid2()",
        "leave it out: it holds that value, and is read-only",
    }
    for index in kvm.get_msr_index_list():
        with suppress_msr_error() as refused:
            guest.vcpu.set_msrs(guest.vcpu.get_msrs([index]))
        assert {error.next_step for error in refused} <= steps
        assert {error.index for error in refused} <= {index}


def test_bits_that_an_msr_does_not_have(guest: RealModeGuest) -> None:
    with pytest.raises(MsrError, match="use bits that the vcpu's cpuid allows: it holds") as caught:
        guest.vcpu.set_msrs({EFER: 1 << 63})
    assert caught.value.index == EFER


@contextmanager
def suppress_msr_error() -> Iterator[list[MsrError]]:
    refused: list[MsrError] = []
    try:
        yield refused
    except MsrError as error:
        refused.append(error)


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
    with pytest.raises(MsrFilterError, match="empty"):
        pack_msr_filter([MsrRange(0x100, [])], default_allow=True)
    with pytest.raises(MsrFilterError, match="at most 16"):
        pack_msr_filter([MsrRange(n, [True]) for n in range(17)], default_allow=True)
    with pytest.raises(MsrFilterError, match="0xffffffff"):
        pack_msr_filter([MsrRange(0xFFFFFFFF, [True, True])], default_allow=True)


@pytest.mark.unit
def test_a_range_longer_than_kvm_takes_becomes_several() -> None:
    flags = [index % 3 == 0 for index in range(2 * MOST_IN_A_RANGE + 5)]
    packed, bitmaps = pack_msr_filter([MsrRange(0x1000, flags)], default_allow=True)
    ranges = [(packed.ranges[i].base, packed.ranges[i].nmsrs) for i in range(4)]
    assert ranges == [
        (0x1000, MOST_IN_A_RANGE),
        (0x1000 + MOST_IN_A_RANGE, MOST_IN_A_RANGE),
        (0x1000 + 2 * MOST_IN_A_RANGE, 5),
        (0, 0),
    ]
    bits = [byte >> bit & 1 for bitmap in bitmaps for byte in bitmap for bit in range(8)]
    assert [bool(bit) for bit in bits[: len(flags)]] == flags


def test_a_long_filter_works(guest: RealModeGuest) -> None:
    """The guest's MSR is in the second of the ranges that KVM gets."""
    need(guest.vm, "KVM_CAP_X86_MSR_FILTER")
    guest.vm.enable_user_msrs()
    first = 0xC0000082 - MOST_IN_A_RANGE - 7
    flags = [True] * (MOST_IN_A_RANGE + 20)
    flags[0xC0000082 - first] = False
    guest.vm.set_msr_filter([MsrRange(first, flags)])
    guest.load("""
        66 B9 82 00 00 C0  ; mov ecx, 0xC0000082
        0F 32              ; rdmsr
        F4                 ; hlt
    """)
    assert run(guest.vcpu) == Rdmsr(0xC0000082, lib.KVM_MSR_EXIT_REASON_FILTER)
    guest.vcpu.reply(0)
    assert run(guest.vcpu) == Hlt()
