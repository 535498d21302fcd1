"""pykvm.kvm.interrupts: interrupts that reach a guest, and eventfds in both directions."""

import errno
import os
import select
import struct
from collections.abc import Iterator

import pytest

from pykvm.kvm import (
    GsiRoutingError,
    Hlt,
    Io,
    IoctlError,
    IrqchipRoute,
    MsiRoute,
    Stopped,
    Vm,
    lib,
)
from tests.rigs.messages import one_line
from tests.rigs.needs import need
from tests.rigs.real_mode import RealModeGuest, run

pytestmark = pytest.mark.kvm

# IRQ 0 and up get vectors 0x20 and up, all unmasked; then wait, and report each interrupt.
WAIT_FOR_INTERRUPTS = """
    B0 11  ; mov al, 0x11     ICW1: edge, cascade, ICW4 follows
    E6 20  ; out 0x20, al
    B0 20  ; mov al, 0x20     ICW2: vectors
    E6 21  ; out 0x21, al
    B0 04  ; mov al, 4        ICW3: slave at IRQ 2
    E6 21  ; out 0x21, al
    B0 01  ; mov al, 1        ICW4: 8086
    E6 21  ; out 0x21, al
    B0 00  ; mov al, 0        OCW1: nothing masked
    E6 21  ; out 0x21, al
    E6 10  ; out 0x10, al     ready
    FB     ; sti
    F4     ; wait: hlt
    EB FD  ; jmp wait
"""
REPORT = """
    B0 20  ; mov al, 0x20     end of interrupt, PIC
    E6 20  ; out 0x20, al
    B0 {}  ; mov al, vector
    E6 11  ; out 0x11, al
    CF     ; iret
"""
READY = Io(0x10, 1, 1, True, b"\0")


def took(vector: int) -> Io:
    return Io(0x11, 1, 1, True, bytes([vector]))


@pytest.fixture
def waiting(vm: Vm) -> RealModeGuest:
    vm.create_irqchip()
    guest = RealModeGuest(vm)
    guest.load(WAIT_FOR_INTERRUPTS)
    for vector in (0x20, 0x24, 0x25, 0x40):
        at = 0x2000 + vector * 0x10
        guest.load(REPORT.format(f"{vector:02x}"), at=at)
        guest.memory[vector * 4 : vector * 4 + 4] = struct.pack("<HH", at, 0)
    # Software-enable the local APIC (SDM vol. 3A 11.4.7.1), so that it takes messages.
    lapic = bytearray(guest.vcpu.get_lapic())
    lapic[0xF1] |= 1
    guest.vcpu.set_lapic(bytes(lapic))
    return guest


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_irq_line(waiting: RealModeGuest) -> None:
    assert run(waiting.vcpu) == READY
    waiting.vm.set_irq_line(4, True)
    assert run(waiting.vcpu) == took(0x24)
    waiting.vm.set_irq_line(4, False)
    assert run(waiting.vcpu, 0.3) == Stopped()  # nothing more comes


def test_irqfd(waiting: RealModeGuest, eventfd: int) -> None:
    need(waiting.vm, "KVM_CAP_IRQFD")
    waiting.vm.register_irqfd(eventfd, 4)
    assert run(waiting.vcpu) == READY
    for _ in range(3):
        os.eventfd_write(eventfd, 1)
        assert run(waiting.vcpu) == took(0x24)
    waiting.vm.unregister_irqfd(eventfd, 4)
    os.eventfd_write(eventfd, 1)
    assert run(waiting.vcpu, 0.3) == Stopped()


def test_irqfd_wants_an_eventfd(waiting: RealModeGuest) -> None:
    need(waiting.vm, "KVM_CAP_IRQFD")
    with open("/dev/null") as file, pytest.raises(IoctlError) as caught:
        waiting.vm.register_irqfd(file, 4)
    assert caught.value.ioctl == "KVM_IRQFD"
    assert caught.value.errno == errno.EINVAL


def test_irqfd_needs_an_irqchip(guest: RealModeGuest, eventfd: int) -> None:
    need(guest.vm, "KVM_CAP_IRQFD")
    with pytest.raises(IoctlError, match=r"call create_irqchip\(\) first"):
        guest.vm.register_irqfd(eventfd, 4)


def test_gsi_routing(waiting: RealModeGuest, eventfd: int) -> None:
    """GSI 20 is routed to pin 5 of the PIC; without the route it leads nowhere there."""
    need(waiting.vm, "KVM_CAP_IRQ_ROUTING")
    waiting.vm.set_gsi_routing([IrqchipRoute(20, lib.KVM_IRQCHIP_PIC_MASTER, 5)])
    waiting.vm.register_irqfd(eventfd, 20)
    assert run(waiting.vcpu) == READY
    os.eventfd_write(eventfd, 1)
    assert run(waiting.vcpu) == took(0x25)


def test_msi_route(waiting: RealModeGuest, eventfd: int) -> None:
    need(waiting.vm, "KVM_CAP_IRQ_ROUTING")
    waiting.vm.set_gsi_routing([MsiRoute(30, 0xFEE00000, 0x40)])
    waiting.vm.register_irqfd(eventfd, 30)
    assert run(waiting.vcpu) == READY
    os.eventfd_write(eventfd, 1)
    assert run(waiting.vcpu) == took(0x40)


def test_impossible_route(waiting: RealModeGuest) -> None:
    need(waiting.vm, "KVM_CAP_IRQ_ROUTING")
    with pytest.raises(IoctlError, match="to a pin that it has") as caught:
        waiting.vm.set_gsi_routing([IrqchipRoute(1, 77, 5)])
    assert caught.value.errno == errno.EINVAL


def test_more_routes_than_kvm_has(waiting: RealModeGuest) -> None:
    """The error is about the number of routes and not about one of them."""
    limit = need(waiting.vm, "KVM_CAP_IRQ_ROUTING")
    with pytest.raises(GsiRoutingError, match=f"pass at most {limit}") as caught:
        waiting.vm.set_gsi_routing([MsiRoute(1, 0xFEE00000, 0x40)] * (limit + 1))
    one_line(caught.value)
    for gsi in (-1, limit):
        with pytest.raises(GsiRoutingError, match=f"use 0 to {limit - 1}") as caught:
            waiting.vm.set_gsi_routing([MsiRoute(gsi, 0xFEE00000, 0x40)])
        one_line(caught.value)


def test_signal_msi(waiting: RealModeGuest) -> None:
    need(waiting.vm, "KVM_CAP_SIGNAL_MSI")
    assert run(waiting.vcpu) == READY
    assert waiting.vm.signal_msi(0xFEE00000, 0x40) > 0
    assert run(waiting.vcpu) == took(0x40)


def test_irqchip_state(waiting: RealModeGuest) -> None:
    assert run(waiting.vcpu) == READY
    state = waiting.vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER)
    assert len(state) == 512
    assert state[5] == 0x20  # irq_base of struct kvm_pic_state, from ICW2
    changed = bytearray(state)
    changed[5] = 0x28
    waiting.vm.set_irqchip(lib.KVM_IRQCHIP_PIC_MASTER, bytes(changed))
    assert waiting.vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER)[5] == 0x28


def test_ioeventfd_on_a_port(guest: RealModeGuest, eventfd: int) -> None:
    need(guest.vm, "KVM_CAP_IOEVENTFD")
    guest.vm.register_ioevent(eventfd, 0x30, 1, port=True, datamatch=7)
    guest.load("""
        B0 07  ; mov al, 7
        E6 30  ; out 0x30, al   no exit
        E6 30  ; out 0x30, al   no exit
        B0 08  ; mov al, 8
        E6 30  ; out 0x30, al   another value: an exit
        F4     ; hlt
    """)
    assert not signalled(eventfd)
    assert run(guest.vcpu) == Io(0x30, 1, 1, True, b"\x08")
    assert os.eventfd_read(eventfd) == 2
    with pytest.raises(IoctlError) as caught:
        guest.vm.register_ioevent(eventfd, 0x30, 1, port=True, datamatch=7)
    assert caught.value.errno == errno.EEXIST
    guest.vm.unregister_ioevent(eventfd, 0x30, 1, port=True, datamatch=7)
    guest.restart()
    assert run(guest.vcpu) == Io(0x30, 1, 1, True, b"\x07")


def test_ioeventfd_on_memory(guest: RealModeGuest, eventfd: int) -> None:
    need(guest.vm, "KVM_CAP_IOEVENTFD")
    guest.vm.delete_memory_slot(0)
    guest.vm.set_user_memory_region(0, 0, 0x8000, guest.host_address)
    guest.vm.register_ioevent(eventfd, 0x9000, 2)
    guest.load("A3 00 90 F4 ; mov [0x9000], ax; hlt")
    assert run(guest.vcpu) == Hlt()
    assert os.eventfd_read(eventfd) == 1


def test_ioeventfd_of_a_wrong_length(guest: RealModeGuest, eventfd: int) -> None:
    need(guest.vm, "KVM_CAP_IOEVENTFD")
    with pytest.raises(IoctlError, match="0, 1, 2, 4 or 8") as caught:
        guest.vm.register_ioevent(eventfd, 0x9000, 3)
    assert caught.value.errno == errno.EINVAL
