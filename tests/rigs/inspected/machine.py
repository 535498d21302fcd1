"""A machine of a few vCPUs in 64-bit mode that run guest.S, for tests of inspection."""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pykvm.closeable import Closeable
from pykvm.inspection.vcpu_gate import VcpuGate
from pykvm.kvm import Exit, Io, Kvm, Vcpu
from pykvm.machine.x86 import long_mode
from pykvm.memory.guest_memory import GuestMemory
from pykvm.paging.entries import Access, X86Entry
from pykvm.sizes import MIB
from pykvm.toolchain import compiler
from pykvm.toolchain.elf import ElfFile

_HERE: Final = Path(__file__).parent

ROOT: Final = 0x1000
LEVEL3: Final = 0x2000
LEVEL2: Final = 0x3000
LEVEL1: Final = 0x4000
_GDT: Final = 0x7000
_TSS: Final = 0x7100
_IDT: Final = 0x8000
STACKS: Final = 0xA000
HIGH: Final = 0xFFFF_8000_0000_0000
"""Where the first 2 MiB are mapped again, in small pages, without the last one."""

_RWX: Final = Access.READ | Access.WRITE | Access.EXECUTE
_BREAKPOINT: Final = 3


def guest_file() -> Path:
    """Return the file of guest.S; as a bare guest it is carried into the emulated host."""
    return compiler.build("bare-guest", [_HERE / "guest.S"], _HERE / "guest.ld")


@functools.cache
def guest_image() -> ElfFile:
    return ElfFile.parse(guest_file().read_bytes())


def address_of(symbol: str) -> int:
    return guest_image().address_of(symbol)


class InspectedMachine(Closeable):
    """The machine; its vCPUs run after `start`.

    Args:
        kvm: an open /dev/kvm.
        cpus: number of vCPUs.
        entry: symbol at which they begin.
        irqchip: whether KVM emulates interrupt controllers.
    """

    def __init__(
        self, kvm: Kvm, *, cpus: int = 1, entry: str = "_start", irqchip: bool = False
    ) -> None:
        self.gate = VcpuGate()
        self.memory = GuestMemory.create(2 * MIB)
        self.vm = kvm.create_vm()
        self.output = bytearray()
        self.failures: list[BaseException] = []
        self.stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._load()
        for slot in self.memory.slots():
            self.vm.set_memory_slot(slot)
        if irqchip:
            self.vm.set_identity_map_address(0xFFFBC000)
            self.vm.set_tss_address(0xFFFBD000)
            self.vm.create_irqchip()
        self.vcpus: list[Vcpu] = []
        cpuid = long_mode.supported_features(kvm, contexts=False, irqchip=irqchip)
        for number in range(cpus):
            vcpu = self.vm.create_vcpu(number)
            vcpu.set_cpuid2(cpuid)
            long_mode.enter(vcpu, ROOT, cpuid, gdt=_GDT, idt=_IDT, tss=_TSS)
            sregs = vcpu.get_sregs()
            sregs.idt.limit = 16 * (_BREAKPOINT + 1) - 1
            vcpu.set_sregs(sregs)
            # Interrupts on: Bochs ignores its own timer while a guest has them disabled.
            vcpu.set_regs(
                rip=address_of(entry), rdi=number, rsp=STACKS + 0x1000 * (number + 1), rflags=0x202
            )
            self.vcpus.append(vcpu)

    def _load(self) -> None:
        for segment in guest_image().segments:
            self.memory.write(segment.address, segment.data)
        self.set_entry(ROOT, 0, X86Entry.table(LEVEL3))
        self.set_entry(ROOT, 256, X86Entry.table(LEVEL3))
        self.set_entry(LEVEL3, 0, X86Entry.table(LEVEL2))
        self.set_entry(LEVEL2, 0, X86Entry.leaf(2, 0, _RWX))
        self.set_entry(LEVEL2, 1, X86Entry.table(LEVEL1))
        first = int(X86Entry.leaf(1, 0, _RWX))
        self.memory.write(LEVEL1, struct.pack("<511Q", *range(first, first + (511 << 12), 1 << 12)))
        self.memory.write(_GDT, long_mode.descriptors(_TSS))
        # An interrupt gate (SDM vol. 3A, 6.14.1).
        handler = address_of("on_breakpoint")
        gate = struct.pack(
            "<HHHHII", handler & 0xFFFF, long_mode.CODE_SELECTOR, 0x8E00, handler >> 16, 0, 0
        )
        self.memory.write(_IDT + 16 * _BREAKPOINT, gate)

    def set_entry(self, table: int, index: int, entry: int) -> None:
        self.memory.write(table + 8 * index, struct.pack("<Q", entry))

    def word(self, symbol: str, index: int = 0) -> int:
        """Return a 64-bit word of the guest's data."""
        data = self.memory.read(address_of(symbol) + 8 * index, 8)
        return int.from_bytes(data, "little")

    def start(self) -> None:
        """Run the vCPUs in threads of their own."""
        for vcpu in self.vcpus:
            thread = threading.Thread(target=self._run, args=(vcpu,), name=f"vcpu {vcpu.id}")
            thread.start()
            self._threads.append(thread)

    def _run(self, vcpu: Vcpu) -> None:
        try:
            self.gate.run(vcpu, lambda found: self._serve(vcpu, found))
        except BaseException as error:
            self.failures.append(error)
            self.gate.close()

    def _serve(self, vcpu: Vcpu, found: Exit) -> None:
        if not isinstance(found, Io):
            raise vcpu.unexpected(found)
        self.output += found.data

    def stop(self) -> None:
        self.stopped.set()
        self.gate.close()

    def close(self) -> None:
        self.gate.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        self.vm.close()
        self.memory.close()
        if self.failures:
            raise self.failures[0]


NewMachine = Callable[..., InspectedMachine]
"""Function that starts a machine, with arguments of `InspectedMachine`."""
