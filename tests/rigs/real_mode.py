"""Tiny real-mode guests, written as bytes with their mnemonics beside them."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pykvm.kvm import Exit, Vcpu, Vm

CODE = 0x1000
MEMORY = 0x10000


class RealModeGuest:
    """64 KiB of memory at GPA 0 and one vCPU in real mode at CODE."""

    def __init__(self, vm: Vm, *, log_dirty: bool = False) -> None:
        self.vm = vm
        self.memory = mmap.mmap(-1, MEMORY)
        # Not from_buffer(): an exported buffer could never be closed.
        array = ctypes.c_char.from_buffer(self.memory)
        self.host_address = ctypes.addressof(array)
        del array
        vm.set_user_memory_region(0, 0, MEMORY, self.host_address, log_dirty=log_dirty)
        self.vcpu = vm.create_vcpu(0)
        self.restart()

    def load(self, code: str, at: int = CODE) -> None:
        """Load machine code.

        Args:
            code: hexadecimal, one instruction a line; text after a ; is a comment.
            at: GPA of the first byte.
        """
        text = "".join(line.split(";")[0] for line in code.splitlines())
        data = bytes.fromhex(text)
        self.memory[at : at + len(data)] = data

    def restart(self, at: int = CODE) -> None:
        sregs = self.vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        self.vcpu.set_sregs(sregs)
        # Enable interrupts. None arrives without an irqchip, but Bochs ignores its own timer while
        # a guest has them disabled, and then nothing could stop a spinning guest.
        self.vcpu.set_regs(rip=at, rsp=0x8000, rflags=0x202)


@contextmanager
def deadline(vcpu: Vcpu, seconds: float = 30) -> Iterator[None]:
    """Stop the vCPU after `seconds`, so that a broken test fails instead of hanging."""
    timer = threading.Timer(seconds, vcpu.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(vcpu: Vcpu, seconds: float = 30) -> Exit:
    """Run with a deadline; return `Stopped` if the guest does not exit by itself."""
    with deadline(vcpu, seconds):
        return vcpu.run()
