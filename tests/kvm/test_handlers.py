"""pykvm.kvm.handlers: exits that C functions serve, and the table of these functions."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pykvm.kvm import (
    NULL_HYPERCALL,
    HandlerError,
    HandlerOverlapError,
    Handlers,
    Hlt,
    Io,
    MmioRead,
    Stopped,
    VcpuRunningError,
    ffi,
)
from tests.rigs.messages import one_line
from tests.rigs.real_mode import CODE, RealModeGuest, run

ACCESS = "int(void *, const struct pykvm_access *)"


class Device:
    """Handler function in Python, for tests only, which records its calls.

    Args:
        answer: the value that reads get, or None to leave the exit to Python.
    """

    def __init__(self, answer: int | None = 0) -> None:
        self.seen: list[tuple[int, int, int, bytes | None]] = []
        self.answer = answer
        self.function = ffi.callback(ACCESS, self._access)

    def _access(self, _context: Any, access: Any) -> int:
        size = access.size * access.count
        data = bytes(access.data[0:size]) if access.is_write else None
        self.seen.append((access.offset, access.size, access.count, data))
        if self.answer is None:
            return 0
        if not access.is_write:
            ffi.buffer(access.data, size)[:] = self.answer.to_bytes(size, "little")
        return 1


# ---- served without Python ----------------------------------------------------------------------


@pytest.mark.kvm
def test_ports(guest: RealModeGuest) -> None:
    device = Device(0xBEEF)
    guest.vm.handlers.add_ports(0x500, 8, device.function)
    guest.load("""
        B8 34 12     ; mov ax, 0x1234
        BA 02 05     ; mov dx, 0x502
        EF           ; out dx, ax
        ED           ; in ax, dx
        A3 00 60     ; mov [0x6000], ax
        F4           ; hlt
    """)
    assert run(guest.vcpu) == Hlt()
    assert device.seen == [(2, 2, 1, b"\x34\x12"), (2, 2, 1, None)]
    assert guest.memory[0x6000:0x6002] == b"\xef\xbe"
    assert guest.vcpu.exit_counts().native == {"KVM_EXIT_IO": 2}


@pytest.mark.kvm
def test_mmio(guest: RealModeGuest) -> None:
    device = Device(0x77)
    guest.vm.delete_memory_slot(0)
    guest.vm.set_user_memory_region(0, 0, 0x8000, guest.host_address)
    guest.vm.handlers.add_mmio(0x9000, 0x1000, device.function)
    guest.load("""
        A0 10 90     ; mov al, [0x9010]
        A2 FF 9F     ; mov [0x9FFF], al
        A1 FF 9F     ; mov ax, [0x9FFF]   reaches behind the range
        F4           ; hlt
    """)
    found = run(guest.vcpu)
    assert device.seen[:2] == [(0x10, 1, 1, None), (0xFFF, 1, 1, b"\x77")]
    assert isinstance(found, MmioRead)  # whole, or the part after the range
    assert guest.vcpu.exit_counts().native["KVM_EXIT_MMIO"] >= 2


@pytest.mark.kvm
def test_a_handler_may_leave_an_exit_to_python(guest: RealModeGuest) -> None:
    device = Device(None)
    guest.vm.handlers.add_ports(0x10, 1, device.function)
    guest.load("E4 10 F4 ; in al, 0x10; hlt")
    assert run(guest.vcpu) == Io(0x10, 1, 1, False, b"")
    assert device.seen == [(0, 1, 1, None)]
    assert guest.vcpu.exit_counts().native == {}


@pytest.mark.kvm
def test_an_access_that_only_begins_in_a_range_is_left_to_python(guest: RealModeGuest) -> None:
    device = Device()
    guest.vm.handlers.add_ports(0x10, 1, device.function)
    guest.load("E5 10 F4 ; in ax, 0x10; hlt")
    assert run(guest.vcpu) == Io(0x10, 2, 1, False, b"")
    assert device.seen == []


@pytest.mark.kvm
def test_many_ranges_are_told_apart(guest: RealModeGuest) -> None:
    devices = {port: Device(port) for port in range(0x20, 0xE0, 3)}
    for port in sorted(devices, key=lambda port: port * 7919 % 256):  # in no order
        guest.vm.handlers.add_ports(port, 2, devices[port].function)
    guest.load("""
        BA 00 00     ; mov dx, 0
        BF 00 60     ; mov di, 0x6000
        EC           ; again: in al, dx
        AA           ; stosb
        42           ; inc dx
        81 FA 00 01  ; cmp dx, 256
        75 F7        ; jne again
        F4           ; hlt
    """)
    while (found := run(guest.vcpu)) != Hlt():
        assert isinstance(found, Io)
        guest.vcpu.reply(0xFF)
    expected = bytearray(b"\xff" * 256)
    for port in devices:
        expected[port] = expected[port + 1] = port
    assert guest.memory[0x6000:0x6100] == expected


@pytest.mark.kvm
def test_a_vcpu_made_later_has_the_handlers_too(guest: RealModeGuest) -> None:
    device = Device()
    guest.vm.handlers.add_ports(0x10, 1, device.function)
    second = guest.vm.create_vcpu(1)
    sregs = second.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    second.set_sregs(sregs)
    second.set_regs(rip=CODE, rflags=0x202)
    guest.load("E6 10 F4 ; out 0x10, al; hlt")
    assert run(second) == Hlt()
    assert run(guest.vcpu) == Hlt()
    assert len(device.seen) == 2


# ---- changes ------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_removed(guest: RealModeGuest) -> None:
    device = Device()
    handler = guest.vm.handlers.add_ports(0x10, 1, device.function)
    assert list(guest.vm.handlers) == [handler]
    guest.vm.handlers.remove(handler)
    guest.load("E6 10 F4 ; out 0x10, al; hlt")
    assert isinstance(run(guest.vcpu), Io)
    assert device.seen == []
    with pytest.raises(HandlerError, match="no handler of port 0x10") as caught:
        guest.vm.handlers.remove(handler)
    one_line(caught.value)


SPIN_ON_A_PORT = "E6 10 EB FC ; again: out 0x10, al; jmp again"


@pytest.mark.kvm
def test_handlers_change_while_the_guest_runs(guest: RealModeGuest) -> None:
    """The guest always meets a handler, and a removed one is not called again."""
    guest.load(SPIN_ON_A_PORT)
    first, second = Device(), Device()
    ends: list[object] = []
    handler = guest.vm.handlers.add_ports(0x10, 1, first.function)
    thread = threading.Thread(target=lambda: ends.append(guest.vcpu.run()))
    thread.start()
    try:
        for _ in range(50):
            other = guest.vm.handlers.add_ports(0x11, 1, second.function)
            guest.vm.handlers.remove(other)
        wait_for(lambda: len(first.seen) > 10)
        guest.vm.handlers.remove(handler)
        seen = len(first.seen)
        thread.join(20)
        assert [type(end) for end in ends] == [Io]
        assert len(first.seen) == seen
        assert second.seen == []
    finally:
        guest.vcpu.stop()
        thread.join(20)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.kvm
def test_a_handler_cannot_change_the_handlers_of_its_vcpu(guest: RealModeGuest) -> None:
    """It would wait for itself."""
    raised: list[VcpuRunningError] = []

    def access(_context: Any, _access: Any) -> int:
        try:
            guest.vm.handlers.add_ports(0x20, 1, Device().function)
        except VcpuRunningError as error:
            raised.append(error)
        return 1

    function = ffi.callback(ACCESS, access)
    handler = guest.vm.handlers.add_ports(0x10, 1, function)
    guest.load("E6 10 F4 ; out 0x10, al; hlt")
    assert run(guest.vcpu) == Hlt()
    assert len(raised) == 1
    assert list(guest.vm.handlers) == [handler]


@pytest.mark.kvm
def test_a_handler_may_stop_its_vcpu(guest: RealModeGuest) -> None:
    def access(_context: Any, _access: Any) -> int:
        guest.vcpu.stop()
        return 1

    function = ffi.callback(ACCESS, access)
    guest.vm.handlers.add_ports(0x10, 1, function)
    guest.load(SPIN_ON_A_PORT)
    assert run(guest.vcpu) == Stopped()


@pytest.mark.kvm
def test_after_close(guest: RealModeGuest) -> None:
    """A closed vCPU takes no handlers, and does not block changes for others."""
    guest.vcpu.close()
    guest.vm.handlers.add_ports(0x10, 1, Device().function)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.unit
def test_overlapping_ranges() -> None:
    handlers, device = Handlers(), Device()
    handlers.add_ports(0x3F8, 8, device.function)
    handlers.add_mmio(0x3F8, 8, device.function)  # another address space: no conflict
    for first, count in ((0x3F8, 8), (0x3F0, 9), (0x3FF, 1), (0x3F9, 2), (0x300, 0x200)):
        with pytest.raises(HandlerOverlapError) as caught:
            handlers.add_ports(first, count, device.function)
        assert "is served by the handler of port 0x3f8 to 0x3ff" in one_line(caught.value)
    handlers.add_ports(0x3F0, 8, device.function)
    handlers.add_ports(0x400, 1, device.function)
    assert [str(handler) for handler in handlers] == [
        "port 0x3f0 to 0x3f7",
        "port 0x3f8 to 0x3ff",
        "port 0x400",
        "gpa 0x3f8 to 0x3ff",
    ]


@pytest.mark.unit
def test_one_handler_for_a_hypercall() -> None:
    handlers = Handlers()
    handlers.add_hypercall(0x4510, NULL_HYPERCALL)
    with pytest.raises(HandlerOverlapError, match="hypercall 0x4510") as caught:
        handlers.add_hypercall(0x4510, NULL_HYPERCALL)
    one_line(caught.value)
    handlers.add_hypercall(2**64 - 1, int(ffi.cast("uintptr_t", NULL_HYPERCALL)), ffi.NULL)


@pytest.mark.unit
@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0x10000, 1), (0xFFFF, 2)])
def test_ports_that_do_not_exist(first: int, count: int) -> None:
    with pytest.raises(HandlerError, match="0 to 0xffff") as caught:
        Handlers().add_ports(first, count, Device().function)
    one_line(caught.value)


@pytest.mark.unit
@pytest.mark.parametrize("nothing", [None, 0, ffi.NULL])
def test_no_function(nothing: object) -> None:
    """The call would go to address 0."""
    with pytest.raises(HandlerError, match="pass a c function") as caught:
        Handlers().add_ports(0x10, 1, nothing)
    one_line(caught.value)
