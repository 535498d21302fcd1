"""pykvm.kvm.x86.vm: interrupt controllers, timers, reserved pages, and the PMU filter."""

import errno

import pytest

from pykvm.kvm import IoctlError, Kvm, StateSizeError, Vm, lib
from tests.rigs.messages import one_line
from tests.rigs.needs import need, refused_without
from tests.rigs.real_mode import RealModeGuest

pytestmark = pytest.mark.kvm


def test_irqchip_comes_once_and_first(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with pytest.raises(IoctlError, match="call it once") as caught:
            vm.create_irqchip()
        assert caught.value.errno == errno.EEXIST
    with kvm.create_vm() as vm:
        vm.create_vcpu(0)
        with pytest.raises(IoctlError, match=r"before the first create_vcpu\(\)"):
            vm.create_irqchip()


def test_split_irqchip(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        need(vm, "KVM_CAP_SPLIT_IRQCHIP")
        vm.enable_split_irqchip(24)
        vcpu = vm.create_vcpu(0)
        assert len(vcpu.get_lapic()) == 1024
        with pytest.raises(IoctlError):
            vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)


def test_pit(vm: Vm) -> None:
    need(vm, "KVM_CAP_PIT2")
    vm.create_irqchip()
    vm.create_pit2()
    state = vm.get_pit2()
    state.channels[0].count = 0x1234
    state.channels[0].mode = 2
    vm.set_pit2(state)
    assert vm.get_pit2().channels[0].count == 0x1234
    vm.set_pit_reinject(False)


def test_pit_comes_once(vm: Vm) -> None:
    need(vm, "KVM_CAP_PIT2")
    vm.create_irqchip()
    vm.create_pit2()
    with pytest.raises(IoctlError) as caught:
        vm.create_pit2()
    assert caught.value.errno == errno.EEXIST


def test_clock(vm: Vm) -> None:
    need(vm, "KVM_CAP_ADJUST_CLOCK")
    vm.set_clock(10**15)
    now = vm.get_clock().clock
    assert 10**15 <= now < 10**15 + 600 * 10**9


def test_tsc_of_the_vm(vm: Vm) -> None:
    if refused_without(vm, "KVM_CAP_VM_TSC_CONTROL", vm.get_tsc_khz):
        return
    khz = vm.get_tsc_khz()
    assert khz > 1000
    vm.set_tsc_khz(khz)
    assert vm.create_vcpu(0).get_tsc_khz() == khz


def test_a_state_of_another_length(vm: Vm) -> None:
    """The kernel would access bytes after a short state, or omit the end of a long one."""
    vm.create_irqchip()
    chip = lib.KVM_IRQCHIP_PIC_MASTER
    state = vm.get_irqchip(chip)
    for wrong in (state[:-1], state + b"x", b""):
        with pytest.raises(StateSizeError, match="pass 512") as caught:
            vm.set_irqchip(chip, wrong)
        one_line(caught.value)
    assert vm.get_irqchip(chip) == state


def test_addresses_below_4_gib_for_real_mode(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        need(vm, "KVM_CAP_SET_IDENTITY_MAP_ADDR")
        vm.set_identity_map_address(0xFFFBC000)
        vm.set_tss_address(0xFFFBD000)
        vm.create_vcpu(0)
        with pytest.raises(IoctlError, match=r"before the first create_vcpu"):
            vm.set_identity_map_address(0xFFFBC000)


def test_limit_of_shadow_pages(vm: Vm) -> None:
    need(vm, "KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
    vm.set_nr_mmu_pages(1024)
    with pytest.raises(IoctlError) as caught:
        vm.set_nr_mmu_pages(63)  # KVM_MIN_ALLOC_MMU_PAGES is 64
    assert caught.value.errno == errno.EINVAL


def test_pmu_event_filter(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_PMU_EVENT_FILTER")
    guest.vm.set_pmu_event_filter([0x3C, 0xC0], allow=True)
    guest.vm.set_pmu_event_filter([], allow=False)
    with pytest.raises(IoctlError, match="pass fewer events") as caught:
        guest.vm.set_pmu_event_filter(list(range(100_000)), allow=True)
    assert caught.value.errno == errno.E2BIG
    one_line(caught.value)
