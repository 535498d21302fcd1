"""Tiny real-mode guests, written as bytes with their mnemonics beside them."""

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pykvm.kvm import CapabilityMissingError, Exit, Kvm, Vcpu, Vm
from pykvm.kvm.handle import Handle

CODE = 0x1000
MEMORY = 0x10000


def need(handle: Handle, capability: str) -> int:
    """The capability's value; skips the test, by name, where it is 0."""
    value = handle.check_extension(capability)
    if not value:
        pytest.skip(f"this kvm has no {capability}")
    return value


def refused_without(handle: Handle, capability: str, call: Callable[[], object]) -> bool:
    """Where the capability is 0, checks that the call says so; True then."""
    if handle.check_extension(capability):
        return False
    with pytest.raises(CapabilityMissingError, match=capability):
        call()
    return True


def need_hardware(what: str) -> None:
    """Skips, by name, where KVM interprets guests in software and leaves `what` out."""
    if not any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")):
        pytest.skip(f"neither kvm_intel nor kvm_amd is loaded: no {what}")


class RealModeGuest:
    """64 KiB of memory at GPA 0, one vCPU in real mode at CODE."""

    def __init__(self, vm: Vm, *, log_dirty: bool = False) -> None:
        self.vm = vm
        self.memory = mmap.mmap(-1, MEMORY)
        # Not from_buffer: an exported buffer could never be closed.
        array = ctypes.c_char.from_buffer(self.memory)
        self.host_address = ctypes.addressof(array)
        del array
        vm.set_memory_region(0, 0, MEMORY, self.host_address, log_dirty=log_dirty)
        self.vcpu = vm.create_vcpu(0)
        self.restart()

    def load(self, code: str, at: int = CODE) -> None:
        """code: hexadecimal, one instruction a line; what follows a ; is for the reader."""
        text = "".join(line.split(";")[0] for line in code.splitlines())
        data = bytes.fromhex(text)
        self.memory[at : at + len(data)] = data

    def restart(self, at: int = CODE) -> None:
        sregs = self.vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        self.vcpu.set_sregs(sregs)
        # Interrupts on: none comes without an irqchip, but Bochs does not take its own timer's
        # while a guest has them off, so that nothing could stop a guest that spins.
        self.vcpu.set_regs(rip=at, rsp=0x8000, rflags=0x202)


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as handle:
        yield handle


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as handle:
        # Where a processor lacks "unrestricted guest", real mode needs three pages for a TSS.
        handle.set_tss_address(0xFFFBD000)
        yield handle


@pytest.fixture
def guest(vm: Vm) -> RealModeGuest:
    return RealModeGuest(vm)


@contextmanager
def deadline(vcpu: Vcpu, seconds: float = 30) -> Iterator[None]:
    """Stops the vCPU after some time, so that a broken test fails instead of hanging."""
    timer = threading.Timer(seconds, vcpu.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(vcpu: Vcpu, seconds: float = 30) -> Exit:
    """run() with a deadline: `Stopped` if the guest does not leave by itself."""
    with deadline(vcpu, seconds):
        return vcpu.run()


@pytest.fixture
def one_line() -> object:
    def check(error: BaseException) -> str:
        """An error is one line, starts in lower case (macros aside) and says what to do next."""
        message = str(error)
        first = message.split(maxsplit=1)[0]
        assert "\n" not in message
        assert first[0].islower() or first.startswith(("KVM_", "/"))
        assert ": " in message
        return message

    return check
