"""System-management memory with a handler that reports each of its runs to the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pykvm.machine.bare import boot_info
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.regions import MemoryFile, Region

SMRAM_GPA: Final = 0x3_0000  # SMBASE after a reset (SDM vol. 3C, 32.11)
SMRAM_SIZE: Final = 0x1_0000
_ENTRY: Final = 0x8000
_SAVED_RIP: Final = 0xFF78  # offset in the 64-bit layout that KVM uses, arch/x86/kvm/smm.c
_SLOT: Final = 1 << 16  # in address space 1, which a vCPU uses in system-management mode only

IN_HANDLER: Final = 0x2A
# mov al, IN_HANDLER; out MARK_PORT, al; rsm
_HANDLER: Final = bytes([0xB0, IN_HANDLER, 0xE6, boot_info.MARK_PORT, 0x0F, 0xAA])


class Smram:
    """Contents of system-management memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        memory[_ENTRY : _ENTRY + len(_HANDLER)] = _HANDLER

    @property
    def saved_rip(self) -> int:
        """RIP at the last interrupt; 0 if there has been none."""
        return int.from_bytes(self._memory[_SAVED_RIP : _SAVED_RIP + 8], "little")


@contextmanager
def smram(guest: BareGuest) -> Iterator[Smram]:
    """Give the guest system-management memory for the duration of the context.

    Marks with IN_HANDLER come from the handler.
    """
    with (
        MemoryFile("smram", SMRAM_SIZE) as file,
        Region(file, SMRAM_GPA, prefault=True) as region,
    ):
        guest.vm.set_user_memory_region(_SLOT, SMRAM_GPA, SMRAM_SIZE, region.host_address)
        try:
            yield Smram(region.view())
        finally:
            guest.vm.delete_memory_slot(_SLOT)
