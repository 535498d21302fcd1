"""pykvm.kvm.stats: KVM's own counters, by name."""

import re
import threading

import pytest

from pykvm.kvm import Hlt, Io, Vm
from tests.rigs.needs import need
from tests.rigs.real_mode import RealModeGuest, run
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.kvm


def test_of_a_vm(vm: Vm) -> None:
    need(vm, "KVM_CAP_BINARY_STATS_FD")
    with vm.stats() as stats:
        assert re.fullmatch(r"kvm-\d+", stats.id)  # the process, as the first PID namespace has it
        assert "remote_tlb_flush" in stats.names()
        assert stats.read().keys() == set(stats.names())
    stats.close()


def test_of_a_vcpu_counts_exits(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_BINARY_STATS_FD")
    stats = guest.vcpu.stats()
    assert "vcpu-0" in stats.id
    assert {"exits", "io_exits", "halt_exits", "mmio_exits", "hypercalls"} <= set(stats.names())
    assert stats.names() == sorted(stats.names())
    guest.load("""
        B9 05 00  ; mov cx, 5
        E6 10     ; again: out 0x10, al
        E2 FC     ; loop again
        F4        ; hlt
    """)
    before = stats.read()
    for _ in range(5):
        assert isinstance(run(guest.vcpu), Io)
    assert run(guest.vcpu) == Hlt()
    after = stats.read()
    assert isinstance(before["exits"], int)
    assert isinstance(after["exits"], int)
    assert after["exits"] >= before["exits"] + 6
    assert stats.value("exits") == after["exits"]


def test_histograms_have_buckets(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_BINARY_STATS_FD")
    stats = guest.vcpu.stats()
    values = stats.read()
    histograms = [each for each in stats.statistics if "hist" in each.kind]
    assert histograms
    for each in histograms:
        buckets = values[each.name]
        assert isinstance(buckets, list)
        assert len(buckets) == each.size


def test_descriptions(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_BINARY_STATS_FD")
    described = {each.name: each for each in guest.vcpu.stats().statistics}
    exits = described["exits"]
    assert (exits.kind, exits.unit, exits.size) == ("cumulative", "none", 1)
    wait = described["halt_wait_ns"]
    assert (wait.unit, wait.base, wait.exponent) == ("seconds", 10, -9)


def test_unknown_name(vm: Vm) -> None:
    need(vm, "KVM_CAP_BINARY_STATS_FD")
    with pytest.raises(KeyError, match=r"no statistic 'nonsense' in kvm-.*: use one of"):
        vm.stats().value("nonsense")


def test_reading_while_the_guest_runs(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_BINARY_STATS_FD")
    stats = guest.vcpu.stats()
    guest.load("EB FE ; jmp $")
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    wait_for(lambda: guest.vcpu.running)
    assert stats.value("exits") >= 0
    assert guest.vcpu.running
    guest.vcpu.stop()
    thread.join(20)
    assert not thread.is_alive()
