"""pykvm.devices.debug_console: output that Python sees only on request."""

from collections.abc import Iterator

import pytest

from pykvm.devices.debug_console import DEBUG_PORT, ConsoleSizeError, DebugConsole
from pykvm.kvm import Hlt, Io, Kvm
from tests.rigs.real_mode import RealModeGuest, run

ALPHABET = """
    B0 61  ; mov al, 'a'
    E6 E9  ; again: out 0xE9, al
    FE C0  ; inc al
    3C 7B  ; cmp al, 'z' + 1
    75 F8  ; jne again
    F4     ; hlt
"""


@pytest.fixture
def guest() -> Iterator[RealModeGuest]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield RealModeGuest(vm)


@pytest.mark.kvm
def test_several_ports(guest: RealModeGuest) -> None:
    console = DebugConsole()
    console.attach(guest.vm.handlers)
    console.attach(guest.vm.handlers, 0x3F8)
    guest.memory[0x6000:0x6006] = b"hello "
    guest.load("""
        BE 00 60     ; mov si, 0x6000
        B9 06 00     ; mov cx, 6
        BA F8 03     ; mov dx, 0x3F8
        F3 6E        ; rep outsb
        B0 57        ; mov al, 'W'
        E6 E9        ; out 0xE9, al
        F4           ; hlt
    """)
    assert console.read() == b""
    assert run(guest.vcpu) == Hlt()
    assert console.read() == b"hello W"
    assert console.read() == b""
    assert console.dropped == 0
    assert guest.vcpu.exit_counts().returned == {"KVM_EXIT_HLT": 1}


@pytest.mark.kvm
def test_overflow_is_counted(guest: RealModeGuest) -> None:
    console = DebugConsole(10)
    console.attach(guest.vm.handlers)
    guest.load(ALPHABET)
    for turn in (1, 2):
        assert run(guest.vcpu) == Hlt()
        assert console.read() == b"abcdefghij"
        assert console.dropped == 16 * turn
        guest.restart()


@pytest.mark.kvm
def test_more_than_one_chunk(guest: RealModeGuest) -> None:
    console = DebugConsole(26 * 400)
    console.attach(guest.vm.handlers)
    guest.load(f"""
        BB 90 01  ; mov bx, 400
        {ALPHABET.replace("F4     ; hlt", "")}
        4B        ; dec bx
        75 F3     ; jnz mov al, 'a'
        F4        ; hlt
    """)
    assert run(guest.vcpu, 60) == Hlt()
    assert console.read() == bytes(range(ord("a"), ord("z") + 1)) * 400
    assert console.dropped == 0


@pytest.mark.kvm
def test_input_is_left_to_python(guest: RealModeGuest) -> None:
    DebugConsole().attach(guest.vm.handlers)
    guest.load("E4 E9 F4 ; in al, 0xE9; hlt")
    assert run(guest.vcpu) == Io(DEBUG_PORT, 1, 1, False, b"")


@pytest.mark.unit
@pytest.mark.parametrize("size", [0, -1])
def test_size(size: int) -> None:
    with pytest.raises(ConsoleSizeError, match="use 1 or more"):
        DebugConsole(size)
