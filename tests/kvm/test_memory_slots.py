"""pykvm.kvm.memory_slots: slots, read-only memory, dirty logs, coalesced writes."""

import errno
from dataclasses import dataclass

import pytest

from pykvm.kvm import (
    DirtyLogError,
    Hlt,
    IoctlError,
    MemorySlotError,
    MemorySlotOverlapError,
    MmioRead,
    MmioWrite,
    Vm,
)
from tests.rigs.messages import one_line
from tests.rigs.needs import need
from tests.rigs.real_mode import CODE, MEMORY, RealModeGuest, run

pytestmark = pytest.mark.kvm


WRITES_TO_PAGES_5_AND_7 = """
    B0 2A     ; mov al, 42
    A2 10 50  ; mov [0x5010], al
    A2 10 70  ; mov [0x7010], al
    F4        ; hlt
"""


@dataclass(frozen=True)
class Slot:
    number: int
    gpa: int
    size: int
    host_address: int
    read_only: bool = False


@pytest.mark.parametrize(
    ("gpa", "size", "offset", "what"),
    [
        (0x100010, 0x1000, 0, "gpa"),
        (0x100000, 0x1800, 0, "size"),
        (0x100000, 0x1000, 0x10, "host address"),
    ],
)
def test_alignment(guest: RealModeGuest, gpa: int, size: int, offset: int, what: str) -> None:
    with pytest.raises(MemorySlotError, match="multiples of 0x1000") as caught:
        guest.vm.set_user_memory_region(5, gpa, size, guest.host_address + offset)
    assert what in one_line(caught.value)
    assert caught.value.errno == errno.EINVAL


def test_overlap(guest: RealModeGuest) -> None:
    with pytest.raises(MemorySlotOverlapError) as caught:
        guest.vm.set_user_memory_region(1, MEMORY - 0x1000, 0x2000, guest.host_address)
    assert caught.value.errno == errno.EEXIST
    assert "another gpa" in one_line(caught.value)
    guest.vm.set_user_memory_region(1, MEMORY, 0x1000, guest.host_address)  # adjacent: allowed


def test_slot_number_too_large(guest: RealModeGuest) -> None:
    limit = guest.vm.check_extension("KVM_CAP_NR_MEMSLOTS")
    with pytest.raises(MemorySlotError, match=f"below {limit}") as caught:
        guest.vm.set_user_memory_region(limit, 0x100000, 0x1000, guest.host_address)
    one_line(caught.value)


def test_addresses_beyond_64_bits(guest: RealModeGuest) -> None:
    with pytest.raises(MemorySlotError, match="64-bit"):
        guest.vm.set_user_memory_region(1, 1 << 64, 0x1000, guest.host_address)


def test_empty_slot_and_deleting(guest: RealModeGuest) -> None:
    with pytest.raises(MemorySlotError, match=r"use delete_memory_slot\(3\)"):
        guest.vm.set_user_memory_region(3, 0x100000, 0, guest.host_address)
    with pytest.raises(MemorySlotError, match=r"no memory slot 3: use one of \[0\]"):
        guest.vm.delete_memory_slot(3)
    guest.vm.set_memory_slot(Slot(3, 0x100000, 0x1000, guest.host_address))
    guest.vm.delete_memory_slot(3)
    with pytest.raises(MemorySlotError):
        guest.vm.delete_memory_slot(3)
    # The place is free again.
    guest.vm.set_memory_slot(Slot(4, 0x100000, 0x1000, guest.host_address))


def test_what_cannot_change_is_refused_by_name(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_READONLY_MEM")
    for slot, what in (
        (Slot(0, 0, MEMORY // 2, guest.host_address), "size"),
        (Slot(0, 0, MEMORY, guest.host_address + 0x1000), "host address"),
        (Slot(0, 0, MEMORY, guest.host_address, read_only=True), "read only"),
    ):
        with pytest.raises(MemorySlotError) as caught:
            guest.vm.set_memory_slot(slot)
        assert caught.value.next_step == f"call delete_memory_slot(0) before changing its {what}"
        one_line(caught.value)
    guest.vm.set_memory_slot(Slot(0, 0x20000, MEMORY, guest.host_address))  # moving is allowed


def test_a_slot_larger_than_kvm_has(guest: RealModeGuest) -> None:
    with pytest.raises(MemorySlotError) as caught:
        guest.vm.set_user_memory_region(1, 0x100000, 1 << 43, 0)
    assert caught.value.next_step == "use several slots of at most 0x7fffffff000 bytes"


def test_memory_that_is_not_this_processes(guest: RealModeGuest) -> None:
    """The message blames the addresses: neither the slot nor its size is wrong."""
    with pytest.raises(MemorySlotError, match="memory of this process"):
        guest.vm.set_user_memory_region(1, 0x100000, 0x1000, 1 << 63)


def test_no_memory_becomes_mmio(guest: RealModeGuest) -> None:
    guest.vm.delete_memory_slot(0)
    guest.vm.set_memory_slot(Slot(0, 0, 0x8000, guest.host_address))
    guest.load("""
        A1 00 90  ; mov ax, [0x9000]
        A3 08 90  ; mov [0x9008], ax
        F4        ; hlt
    """)
    assert run(guest.vcpu) == MmioRead(0x9000, 2)
    guest.vcpu.reply(0xBEEF)
    assert run(guest.vcpu) == MmioWrite(0x9008, b"\xef\xbe")
    assert run(guest.vcpu) == Hlt()


def test_read_only_slot(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_READONLY_MEM")
    guest.vm.delete_memory_slot(0)
    page = guest.host_address
    guest.vm.set_memory_slot(Slot(0, 0, 0x5000, page))
    guest.vm.set_memory_slot(Slot(1, 0x5000, 0x1000, page + 0x5000, read_only=True))
    guest.memory[0x5000] = 7
    guest.load("""
        A0 00 50  ; mov al, [0x5000]
        A2 00 40  ; mov [0x4000], al
        A2 01 50  ; mov [0x5001], al
        F4        ; hlt
    """)
    assert run(guest.vcpu) == MmioWrite(0x5001, b"\7")
    assert guest.memory[0x4000] == 7
    assert guest.memory[0x5001] == 0
    assert run(guest.vcpu) == Hlt()


def test_dirty_log(vm: Vm) -> None:
    guest = RealModeGuest(vm, log_dirty=True)
    guest.load(WRITES_TO_PAGES_5_AND_7)
    vm.get_dirty_log(0)
    assert run(guest.vcpu) == Hlt()
    assert guest.memory[0x5010] == guest.memory[0x7010] == 42
    dirty = vm.get_dirty_log(0)
    assert {5, 7} <= set(dirty)
    assert 9 not in dirty
    assert vm.get_dirty_log(0) == []  # reading cleared it
    guest.restart()
    assert run(guest.vcpu) == Hlt()
    assert {5, 7} <= set(vm.get_dirty_log(0))


def test_manual_dirty_log(vm: Vm) -> None:
    need(vm, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    vm.enable_manual_dirty_log()
    guest = RealModeGuest(vm, log_dirty=True)
    guest.load(WRITES_TO_PAGES_5_AND_7)
    assert run(guest.vcpu) == Hlt()
    assert {5, 7} <= set(vm.get_dirty_log(0))
    assert {5, 7} <= set(vm.get_dirty_log(0))  # still dirty
    vm.clear_dirty_log(0, [5])
    dirty = vm.get_dirty_log(0)
    assert 5 not in dirty
    assert 7 in dirty


def test_dirty_log_needs_the_flag(guest: RealModeGuest) -> None:
    with pytest.raises(IoctlError, match="log_dirty=True") as caught:
        guest.vm.get_dirty_log(0)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.ioctl == "KVM_GET_DIRTY_LOG"
    one_line(caught.value)
    with pytest.raises(MemorySlotError):
        guest.vm.get_dirty_log(9)


@pytest.mark.parametrize("page", [-1, MEMORY // 0x1000, 1 << 40])
def test_pages_that_a_slot_does_not_have(guest: RealModeGuest, page: int) -> None:
    with pytest.raises(DirtyLogError, match=f"no page {page}: use 0 to 15") as caught:
        guest.vm.clear_dirty_log(0, [5, page])
    one_line(caught.value)


def test_coalesced_writes(guest: RealModeGuest) -> None:
    need(guest.vm, "KVM_CAP_COALESCED_MMIO")
    guest.vm.delete_memory_slot(0)
    guest.vm.set_memory_slot(Slot(0, 0, 0x8000, guest.host_address))
    guest.vm.register_coalesced_mmio(0x9000, 0x1000)
    guest.load("""
        B0 2A     ; mov al, 42
        A2 00 90  ; mov [0x9000], al
        A2 04 90  ; mov [0x9004], al
        A2 00 A0  ; mov [0xA000], al   not in the zone
        F4        ; hlt
    """)
    assert run(guest.vcpu) == MmioWrite(0xA000, b"*")
    writes = guest.vcpu.coalesced_writes()
    assert [(w.address, w.data, w.port) for w in writes] == [
        (0x9000, b"*", False),
        (0x9004, b"*", False),
    ]
    assert guest.vcpu.coalesced_writes() == []
    guest.vm.unregister_coalesced_mmio(0x9000, 0x1000)
    guest.restart()
    assert run(guest.vcpu) == MmioWrite(0x9000, b"*")


def test_reading_for_reports(guest: RealModeGuest) -> None:
    guest.memory[0x2000:0x2004] = b"here"
    assert guest.vm.read_physical(0x2000, 4) == b"here"
    assert guest.vm.read_physical(MEMORY - 2, 15) == b"\0\0"
    assert guest.vm.read_physical(MEMORY, 15) == b""
    assert CODE < MEMORY
