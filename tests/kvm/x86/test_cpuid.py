"""pykvm.kvm.x86.cpuid: leaves read, set for a guest, and looked up."""

import dataclasses
import errno

import pytest

from pykvm.kvm import CpuidEntry, Hlt, IoctlError, find_leaf, lib
from tests.rigs.messages import one_line
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.kvm


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
    assert find_leaf(leaves, 0, 9) is leaves[0]  # ECX does not matter there
    assert str(leaves[2]) == "0x00000004.1 eax=00000002 ebx=00000000 ecx=00000000 edx=00000000"


def test_set_and_get(guest: RealModeGuest) -> None:
    leaves = guest.vm.kvm.get_supported_cpuid()
    guest.vcpu.set_cpuid2(leaves)
    found = [(leaf.function, leaf.index) for leaf in guest.vcpu.get_cpuid2()]
    # Some kernels leave out what says nothing, such as AMX's leaves of a KVM without AMX.
    empty = [leaf for leaf in leaves if not (leaf.eax or leaf.ebx or leaf.ecx or leaf.edx)]
    may_be_missing = {(leaf.function, leaf.index) for leaf in empty} - set(found)
    given = [(leaf.function, leaf.index) for leaf in leaves]
    assert found == [place for place in given if place not in may_be_missing]


def test_the_guest_sees_it(guest: RealModeGuest) -> None:
    leaves = guest.vm.kvm.get_supported_cpuid()
    mine = CpuidEntry(0x40000000, eax=0x40000000, ebx=0x4B594C45, ecx=0x1234)
    leaves = [leaf for leaf in leaves if leaf.function < 0x40000000] + [mine]
    guest.vcpu.set_cpuid2(leaves)
    guest.load("""
        66 B8 00 00 00 40  ; mov eax, 0x40000000
        0F A2              ; cpuid
        66 89 1E 00 60     ; mov [0x6000], ebx
        F4                 ; hlt
    """)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x6000:0x6004] == b"ELYK"


def test_many_leaves_are_read_back(guest: RealModeGuest) -> None:
    """There are more leaves than the reader's first guess."""
    leaves = [CpuidEntry(0x50000000 + number, eax=number) for number in range(100)]
    guest.vcpu.set_cpuid2(leaves)
    found = guest.vcpu.get_cpuid2()
    assert [dataclasses.astuple(leaf) for leaf in found] == [
        dataclasses.astuple(leaf) for leaf in leaves
    ]


def test_more_leaves_than_kvm_keeps(guest: RealModeGuest) -> None:
    leaves = [CpuidEntry(0x50000000 + number) for number in range(1000)]
    with pytest.raises(IoctlError, match="leave out leaves") as caught:
        guest.vcpu.set_cpuid2(leaves)
    assert caught.value.errno == errno.E2BIG
    one_line(caught.value)
