"""pykvm.snapshot.kvm_state: all of a VM's state comes back; states of no VM are refused."""

import copy
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pykvm.errors import PykvmError
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm, MpState, Vcpu, Vm, find_leaf, lib
from pykvm.snapshot.kvm_state import ArchitectureError, restore_kvm, save_kvm
from pykvm.snapshot.pause_notice import tell_of_pause
from pykvm.snapshot.x86 import clocks
from pykvm.snapshot.x86.clocks import TscFrequencyError
from pykvm.snapshot.x86.features import HostFeatureError
from pykvm.snapshot.x86.structs import KvmStateError, from_values, to_values
from tests.rigs.messages import one_line
from tests.rigs.needs import need
from tests.rigs.real_mode import RealModeGuest

pytestmark = [pytest.mark.kvm, pytest.mark.native]

STAR, LSTAR, PAT, MTRR_DEF_TYPE = 0xC000_0081, 0xC000_0082, 0x277, 0x2FF
TSC_DEADLINE = 0x6E0
DEADLINE_BIT = 1 << 24
LAPIC_TIMER, LAPIC_SPURIOUS = 0x320, 0xF0


def new_vm(kvm: Kvm, cpus: int = 1) -> tuple[Vm, list[Vcpu]]:
    """Return a VM with interrupt controllers, memory and vCPUs that have all that KVM offers."""
    vm = kvm.create_vm()
    vm.set_tss_address(0xFFFBD000)
    vm.create_irqchip()
    guest = RealModeGuest(vm)
    vcpus = [guest.vcpu, *(vm.create_vcpu(number) for number in range(1, cpus))]
    entries = kvm.get_supported_cpuid()
    leaf = find_leaf(entries, 1)
    assert leaf
    if kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"):
        leaf.ecx |= DEADLINE_BIT
    for vcpu in vcpus:
        vcpu.set_cpuid2(entries)
    return vm, vcpus


@pytest.fixture
def one(kvm: Kvm) -> Iterator[tuple[Vm, list[Vcpu]]]:
    made = new_vm(kvm)
    yield made
    made[0].close()


@pytest.fixture
def other(kvm: Kvm) -> Iterator[tuple[Vm, list[Vcpu]]]:
    made = new_vm(kvm)
    yield made
    made[0].close()


def saved(machine: tuple[Vm, list[Vcpu]]) -> Any:
    return json.loads(json.dumps(save_kvm(*machine)))


def without_time(state: Any) -> Any:
    """Return a state without what passes."""
    state = copy.deepcopy(state)
    del state["kvmclock"]
    for vcpu in state["vcpus"]:
        del vcpu["tsc"]
    return state


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return the places in which two states differ."""
    if type(found) is not type(expected):
        return [f"{where}: {found!r}, not {expected!r}"]
    if isinstance(found, dict) and found.keys() == expected.keys():
        parts = [(str(key), found[key], expected[key]) for key in found]
    elif isinstance(found, list) and len(found) == len(expected):
        parts = [(str(n), found[n], expected[n]) for n in range(len(found))]
    else:
        return [] if found == expected else [f"{where}: {found!r}, not {expected!r}"]
    return [line for name, a, b in parts for line in differences(a, b, f"{where}.{name}")]


def fill(vm: Vm, vcpu: Vcpu) -> None:
    """Put something everywhere."""
    regs = vcpu.get_regs()
    for number, name in enumerate(("rax", "rbx", "rsi", "r8", "r15")):
        setattr(regs, name, 0x1234_5678_0000_0000 + number)
    vcpu.set_regs(regs)
    sregs = vcpu.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = 0x5000, 0x7F
    sregs.cr2 = 0x7777
    vcpu.set_sregs(sregs)
    area = bytearray(vcpu.get_xsave())
    area[512] |= 2  # XSTATE_BV: SSE state is valid (SDM vol. 1, 13.4.2)
    area[160 + 2 * 16 + 1] = 0x77  # XMM2
    vcpu.set_xsave(bytes(area))
    debug = vcpu.get_debug_regs()
    debug.db = [0x1000, 0x2000, 0x3000, 0x4000]
    vcpu.set_debug_regs(debug)
    vcpu.set_msrs({STAR: 0x23 << 48, LSTAR: 0x1234_5000, PAT: 0x0007_0406_0007_0406})
    lapic = bytearray(vcpu.get_lapic())
    lapic[LAPIC_SPURIOUS : LAPIC_SPURIOUS + 2] = b"\xff\x01"  # enabled
    lapic[LAPIC_TIMER : LAPIC_TIMER + 4] = (0x4_00EF).to_bytes(4, "little")  # TSC deadline
    vcpu.set_lapic(bytes(lapic))
    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    events.exception.injected, events.exception.nr = 1, 6
    vcpu.set_vcpu_events(events)
    chip = bytearray(vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC))
    # Redirection of pin 4, masked: vector 0x34 (82093AA data sheet, 3.2.4).
    chip[24 + 4 * 8 : 24 + 5 * 8] = (1 << 16 | 0x34).to_bytes(8, "little")
    vm.set_irqchip(lib.KVM_IRQCHIP_IOAPIC, bytes(chip))
    pic = bytearray(vm.get_irqchip(lib.KVM_IRQCHIP_PIC_SLAVE))
    pic[2] = 0xA5  # interrupt mask
    vm.set_irqchip(lib.KVM_IRQCHIP_PIC_SLAVE, bytes(pic))


def test_all_comes_back(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    vm, (vcpu,) = one
    fill(vm, vcpu)
    state = saved(one)
    (first,) = state["vcpus"]
    msrs = dict(first["msrs"])
    assert msrs[LSTAR] == 0x1234_5000
    assert list(msrs)[-1] == TSC_DEADLINE
    assert MTRR_DEF_TYPE in msrs
    assert first["events"]["exception"]["nr"] == 6
    assert state["chips"].keys() == {"pic_master", "pic_slave", "ioapic"}
    assert without_time(saved(other)) != without_time(state)
    restore_kvm(*other, state)
    assert differences(without_time(saved(other)), without_time(state)) == []
    assert other[1][0].get_msrs([LSTAR]) == {LSTAR: 0x1234_5000}
    assert other[0].get_irqchip(lib.KVM_IRQCHIP_PIC_SLAVE)[2] == 0xA5


def test_a_timer_comes_back(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    """The deadline is kept: KVM drops it while the local APIC's timer is in another mode."""
    vm, (vcpu,) = one
    need(vm, "KVM_CAP_TSC_DEADLINE_TIMER")
    fill(vm, vcpu)
    (now,) = vcpu.get_msrs([clocks.MSR_TSC]).values()
    vcpu.set_msrs({TSC_DEADLINE: now + 10**13})
    state = saved(one)
    assert dict(state["vcpus"][0]["msrs"])[TSC_DEADLINE] == now + 10**13
    restore_kvm(*other, state)
    assert other[1][0].get_msrs([TSC_DEADLINE]) == {TSC_DEADLINE: now + 10**13}


def test_an_application_processor_waits_on(kvm: Kvm) -> None:
    vm, vcpus = new_vm(kvm, cpus=2)
    with vm:
        assert vcpus[1].get_mp_state() == MpState.UNINITIALIZED
        vcpus[0].set_mp_state(MpState.HALTED)
        state = saved((vm, vcpus))
    vm, vcpus = new_vm(kvm, cpus=2)
    with vm:
        restore_kvm(vm, vcpus, state)
        assert [vcpu.get_mp_state() for vcpu in vcpus] == [MpState.HALTED, MpState.UNINITIALIZED]


def test_clocks_go_on_as_if_nothing_had_been(
    one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]
) -> None:
    """kvmclock and the TSC advance by the time in between, of which some hours are made up."""
    hours = 5 * 3600 * 10**9
    state = saved(one)
    tsc = state["vcpus"][0]["tsc"]
    if tsc["offset"] is not None:
        before = one[1][0].get_tsc_offset()
        one[1][0].set_tsc_offset(before - 10**12)
        if one[1][0].get_tsc_offset() != (before - 10**12) % 2**64:
            pytest.skip("this kvm gives guests the host's tsc")
        state = saved(one)
        tsc = state["vcpus"][0]["tsc"]
    state["kvmclock"]["realtime"] -= hours
    tsc["realtime"] -= hours
    restore_kvm(*other, state)
    passed = time.time_ns() - state["kvmclock"]["realtime"]
    assert passed >= hours
    clock = other[0].get_clock().clock - state["kvmclock"]["clock"]
    (now,) = other[1][0].get_msrs([clocks.MSR_TSC]).values()
    ticks = (now - tsc["value"]) * 1_000_000 // tsc["khz"]
    for measured in (clock, ticks):
        assert abs(measured - passed) < 5 * 10**9, (clock, ticks, passed)
    assert abs(clock - ticks) < 10**9


def test_kvmclock_advances(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    hours = 5 * 3600 * 10**9
    state = saved(one)["kvmclock"]
    clocks.restore_kvmclock(other[0], {**state, "realtime": state["realtime"] - hours})
    passed = other[0].get_clock().clock - state["clock"]
    assert hours <= passed < hours + 30 * 10**9
    # A wall clock that was set back since then does not set the guest's back.
    clocks.restore_kvmclock(other[0], {**state, "realtime": state["realtime"] + hours})
    assert 0 <= other[0].get_clock().clock - state["clock"] < 30 * 10**9


def test_counters_keep_their_distances(kvm: Kvm) -> None:
    vm, vcpus = new_vm(kvm, cpus=3)
    with vm:
        if not vcpus[0].has_tsc_offset():
            pytest.skip("this kvm has no KVM_VCPU_TSC_OFFSET")
        offsets = [-(10**14), -(10**14) + 12345, -(10**14) - 99]
        for vcpu, offset in zip(vcpus, offsets, strict=True):
            vcpu.set_tsc_offset(offset)
        if vcpus[1].get_tsc_offset() != offsets[1] % 2**64:
            pytest.skip("this kvm gives guests the host's tsc")
        state = saved((vm, vcpus))
    vm, vcpus = new_vm(kvm, cpus=3)
    with vm:
        restore_kvm(vm, vcpus, state)
        again = [vcpu.get_tsc_offset() for vcpu in vcpus]
        assert (again[1] - again[0]) % 2**64 == 12345
        assert (again[0] - again[2]) % 2**64 == 99


def test_a_guest_without_kvmclock_needs_not_be_told(one: tuple[Vm, list[Vcpu]]) -> None:
    tell_of_pause(one[1])


# ---- hosts that differ ---------------------------------------------------------------------------


def leaf_of(state: Any, function: int, index: int = 0) -> dict[str, int]:
    found: dict[str, int] = next(
        leaf
        for leaf in state["vcpus"][0]["cpuid"]
        if (leaf["function"], leaf["index"]) == (function, index)
    )
    return found


def refused(machine: tuple[Vm, list[Vcpu]], state: Any, kind: type[PykvmError]) -> str:
    with pytest.raises(kind) as caught:
        restore_kvm(*machine, state)
    return one_line(caught.value)


def test_a_host_without_a_feature(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    state = saved(one)
    leaf_of(state, 7)["edx"] |= 1 << 6  # reserved (SDM vol. 2A, CPUID)
    leaf_of(state, 0x8000_0001)["ecx"] |= 1 << 25
    told = refused(other, state, HostFeatureError)
    assert "(cpuid bits 0x7.0 edx 6, 0x80000001.0 ecx 25)" in told
    # Bits that a machine sets by itself are no features of a host.
    state = saved(one)
    leaf_of(state, 1)["ecx"] |= 1 << 31
    restore_kvm(*other, state)


def test_another_maker(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    state = saved(one)
    leaf = leaf_of(state, 0)
    leaf["ebx"], leaf["edx"], leaf["ecx"] = 0x6B6E_6154, 0x2D6D_6150, 0x3678_3852
    assert "on TankPam-R8x6, this processor is" in refused(other, state, HostFeatureError)


def test_another_architecture(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    state = {**saved(one), "architecture": "vax"}
    assert "a machine of vax" in refused(other, state, ArchitectureError)


def test_another_frequency(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    state = saved(one)
    khz = state["vcpus"][0]["tsc"]["khz"]
    state["vcpus"][0]["tsc"]["khz"] = khz + khz // 10_000  # as another boot measures it
    restore_kvm(*other, state)
    if other[0].check_extension("KVM_CAP_TSC_CONTROL"):  # the processor scales it
        state["vcpus"][0]["tsc"]["khz"] = khz * 2
        restore_kvm(*other, state)
        assert other[1][0].get_tsc_khz() == khz * 2
    most = (1 << 31) - 1  # more than any processor scales it to
    state["vcpus"][0]["tsc"]["khz"] = most
    assert f"runs at {most} khz" in refused(other, state, TscFrequencyError)


def test_an_msr_that_is_refused(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    state = saved(one)
    msrs = state["vcpus"][0]["msrs"]
    msrs.insert(0, [0x4FFF_FFFF, 0])  # one that no host knows, with nothing in it
    restore_kvm(*other, state)
    msrs[0] = [0x4FFF_FFFF, 7]
    assert "refuses 0x7 for msr 0x4fffffff" in refused(other, state, HostFeatureError)


def test_extended_state_of_another_length(
    one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]
) -> None:
    state = saved(one)
    area = state["vcpus"][0]["xsave"]
    state["vcpus"][0]["xsave"] = area + "00" * 4096
    restore_kvm(*other, state)
    state["vcpus"][0]["xsave"] = area + "01" * 4096
    assert "bytes of extended state" in refused(other, state, HostFeatureError)


# ---- states of no machine ------------------------------------------------------------------------

_RUBBISH: list[Any] = [None, -1, 1 << 70, "", "zz", [], {}, [[]], [[1, 2, 3]], 1.5]


def variations(state: Any, depth: int) -> Iterator[Any]:
    """Yield copies of a state with something else in one place, or nothing."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        for rubbish in [*_RUBBISH, ...]:
            changed = copy.copy(state)
            if rubbish is ...:
                del changed[key]
            else:
                changed[key] = rubbish
            yield changed
        if depth and isinstance(value, dict | list) and value:
            for inner in variations(value, depth - 1):
                changed = copy.copy(state)
                changed[key] = inner
                yield changed


def test_rubbish(one: tuple[Vm, list[Vcpu]], other: tuple[Vm, list[Vcpu]]) -> None:
    """Whatever a state holds, the answer is an error of ours, or the state is none's business."""
    state = saved(one)
    (vcpu,) = state["vcpus"]
    for name in ("cpuid", "msrs"):
        vcpu[name] = vcpu[name][:2]
    vcpu["cpuid"] = [leaf_of(saved(one), 0), *vcpu["cpuid"][1:]]
    states = list(variations(state, 0))
    for key in ("chips", "kvmclock"):
        states += [{**state, key: rubbish} for rubbish in variations(state[key], 0)]
    states += [{**state, "vcpus": [rubbish]} for rubbish in variations(vcpu, 2)]
    assert len(states) > 600
    # All of them take minutes on the emulated host.
    tried = random.Random(7).sample(states, 60) if is_emulated() else states
    refused = 0
    for rubbish in tried:
        try:
            restore_kvm(*other, rubbish)
        except PykvmError as error:
            one_line(error)
            refused += 1
    assert refused > len(tried) // 2


def test_structs_that_do_not_fit(one: tuple[Vm, list[Vcpu]]) -> None:
    values = to_values(one[1][0].get_sregs())
    assert to_values(from_values("kvm_sregs", values)) == values
    changes: list[dict[str, Any]] = [
        {"cr0": 1 << 64},
        {"cr0": "1"},
        {"cr99": 1},
        {"gdt": 5},
        {"gdt": {"base": 1}},
        {"interrupt_bitmap": [1]},
        {"interrupt_bitmap": {}},
    ]
    for change in changes:
        with pytest.raises(KvmStateError) as caught:
            from_values("kvm_sregs", {**values, **change})
        one_line(caught.value)
