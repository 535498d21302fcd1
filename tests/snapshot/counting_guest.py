"""A guest that does each of 32768 things once, says where it is, and can go on in another process.

It adds 1 to each byte of a table. In the middle it writes to a port, and after the last byte to
another one: whatever is done twice or left out shows in the table.
"""

from pykvm.kvm import Io, Kvm, Vcpu, Vm
from pykvm.memory.guest_memory import GuestMemory
from tests.rigs.real_mode import run

CODE = 0x1000
TABLE = 0x4000
ENTRIES = 0x8000
MIDDLE = 0x3000
SIZE = 0x10000
MIDDLE_PORT, END_PORT = 0x10, 0x11

PROGRAM = bytes.fromhex(
    "31DB"  # xor bx, bx
    "FE870040"  # next: inc byte [bx + TABLE]
    "43"  # inc bx
    "81FB0030"  # cmp bx, MIDDLE
    "7502"  # jne on
    "E610"  # out MIDDLE_PORT, al
    "81FB0080"  # on: cmp bx, ENTRIES
    "75ED"  # jne next
    "E611"  # out END_PORT, al
    "F4"  # hlt
)


def make_vm(kvm: Kvm, memory: GuestMemory, *, irqchip: bool) -> tuple[Vm, Vcpu]:
    """Return a VM and its vCPU, which has its memory and has not run."""
    vm = kvm.create_vm()
    vm.set_tss_address(0xFFFBD000)
    for slot in memory.slots():
        vm.set_memory_slot(slot)
    if irqchip:
        vm.create_irqchip()
    return vm, vm.create_vcpu(0)


def start(kvm: Kvm, memory: GuestMemory, vcpu: Vcpu) -> None:
    """Put the program into memory, and a vCPU at its beginning."""
    memory.write(CODE, PROGRAM)
    vcpu.set_cpuid2(kvm.get_supported_cpuid())
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        segment.base = segment.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(rip=CODE, rsp=0x3FF0, rflags=0x202)


def run_to(vcpu: Vcpu, port: int) -> None:
    """Run until the guest writes to a port, and let it complete that."""
    exit = run(vcpu)
    assert isinstance(exit, Io), exit
    assert exit.port == port
    vcpu.complete()


def done(memory: GuestMemory) -> bytes:
    """Return the table, a byte for each thing: how often it was done."""
    return memory.read(TABLE, ENTRIES)
