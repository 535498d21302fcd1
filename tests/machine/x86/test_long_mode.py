"""CPU features and initial mode of a guest, and a second vCPU beside the first."""

import struct
from dataclasses import dataclass

import pytest

from pykvm.elisa.hidden_features import HIDDEN_FEATURES
from pykvm.kvm import CpuidEntry, Io, Kvm, find_leaf
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.machine.bare.guest import BareGuest
from pykvm.machine.x86 import long_mode
from pykvm.toolchain.elf import ElfFile
from tests.rigs.sources import GUESTS

SMEP, SMAP = 1 << 20, 1 << 21
TSC_DEADLINE = 1 << 24


class FakeKvm:
    """A KVM that offers every bit of the relevant leaves."""

    def __init__(self, *, deadline_timer: bool) -> None:
        self.deadline_timer = deadline_timer

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        ones = 2**32 - 1
        return [
            CpuidEntry(1, 0, 0, ones, ones, ones & ~TSC_DEADLINE, ones),
            CpuidEntry(7, 0, 1, ones, ones, ones, ones),
        ]

    def check_extension(self, capability: str) -> int:
        assert capability == "KVM_CAP_TSC_DEADLINE_TIMER"
        return int(self.deadline_timer)


@pytest.mark.unit
def test_features() -> None:
    kvm = FakeKvm(deadline_timer=True)
    plain = long_mode.supported_features(kvm, contexts=False, irqchip=False)  # type: ignore[arg-type]
    assert plain == kvm.get_supported_cpuid()
    less = long_mode.supported_features(kvm, contexts=True, irqchip=False)  # type: ignore[arg-type]
    assert not [feature for feature in HIDDEN_FEATURES if feature.is_in(less)]
    leaf = find_leaf(less, 7)
    assert leaf is not None
    assert leaf.ebx >> 20 & 1  # SMAP stays: contexts need it


@pytest.mark.kvm
@pytest.mark.parametrize("leaf", [[], [CpuidEntry(7, 0, 1, 0, SMEP, 0, 0)]], ids=["no", "without"])
def test_five_levels_need_the_feature(kvm: Kvm, leaf: list[CpuidEntry]) -> None:
    """The guest's own leaf 7 decides, not this KVM's."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        before = vcpu.get_sregs().cr4
        with pytest.raises(long_mode.PagingLevelsError, match="no five-level paging: use four"):
            long_mode.enter(vcpu, 0x1000, leaf, gdt=0x2000, idt=0x3000, tss=0x4000, levels=5)
        assert vcpu.get_sregs().cr4 == before


@pytest.mark.unit
@pytest.mark.parametrize(("irqchip", "timer"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_deadline_timer(irqchip: int, timer: int) -> None:
    """The timer needs a local APIC in the kernel, and a KVM that supports it there."""
    kvm = FakeKvm(deadline_timer=bool(timer))
    entries = long_mode.supported_features(kvm, contexts=False, irqchip=bool(irqchip))  # type: ignore[arg-type]
    leaf = find_leaf(entries, 1)
    assert leaf is not None
    assert bool(leaf.ecx & TSC_DEADLINE) == bool(irqchip and timer)


@pytest.mark.unit
def test_apic_id() -> None:
    entries = [CpuidEntry(function, ebx=0x3F00_0800, edx=0x3F) for function in (0, 1, 0xB, 0x1F)]
    long_mode.set_apic_id(entries, 0x105)
    assert [entry.ebx for entry in entries] == [0x3F00_0800, 0x0500_0800, *[0x3F00_0800] * 2]
    assert [entry.edx for entry in entries] == [0x3F, 0x3F, 0x105, 0x105]


@pytest.mark.unit
def test_descriptors() -> None:
    """Source: SDM vol. 3A, figures 3-8 and 8-4."""
    null, code, data, task, task_high = struct.unpack("<5Q", long_mode.descriptors(layout.TSS_GPA))
    assert (null, task_high) == (0, layout.TSS_GPA >> 32)
    assert code >> 53 & 3 == 1  # L set, D clear
    assert data >> 54 & 1 == 1
    assert (task >> 16 & 0xFFFFFF) | (task >> 56) << 24 == layout.TSS_GPA
    assert task & 0xFFFF == 0x67


@dataclass(frozen=True)
class Finish:
    """Guest program selftest.c, finishing with a status."""

    status: int

    def image(self) -> ElfFile:
        return build_guest([GUESTS / "selftest.c"])

    def params(self) -> list[int]:
        return [4, self.status]


@pytest.mark.kvm
def test_mode(kvm: Kvm) -> None:
    """Protections are on as far as this KVM has them."""
    with BareGuest(kvm, Finish(3)) as guest:
        sregs = guest.vcpu.get_sregs()
        leaf = find_leaf(kvm.get_supported_cpuid(), 7)
        features = leaf.ebx if leaf else 0
        assert bool(sregs.cr4 & SMEP) == bool(features >> 7 & 1)
        assert bool(sregs.cr4 & SMAP) == bool(features >> 20 & 1)
        assert sregs.efer >> 10 & 1
        assert guest.run() == 3


@pytest.mark.kvm
def test_a_second_vcpu(kvm: Kvm) -> None:
    """It runs the same program from the start, in the same memory."""
    program = Finish(5)
    with BareGuest(kvm, program) as guest:
        second = guest.vm.create_vcpu(1)
        guest.start_vcpu(
            second, program.image().entry, layout.STACK_GPA + 0x1000, layout.BOOT_INFO_GPA
        )
        exit = second.run()
        assert isinstance(exit, Io)
        assert exit.value == 5
        assert guest.run() == 5


@pytest.mark.kvm
def test_without_contexts(kvm: Kvm) -> None:
    """An ordinary VM hides nothing."""
    with BareGuest(kvm, Finish(0), contexts=False) as guest:
        offered = [f.name for f in HIDDEN_FEATURES if f.is_in(kvm.get_supported_cpuid())]
        given = [f.name for f in HIDDEN_FEATURES if f.is_in(guest.vcpu.get_cpuid2())]
        assert given == offered
        assert guest.run() == 0
