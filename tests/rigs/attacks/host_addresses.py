"""Host physical addresses.

No guest is told any. The controls pass one to the guest, as an information leak would.
"""

import os
import struct

from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.guest_memory import GuestMemory
from pykvm.paging.entries import EPTP, Access, EptEntry
from pykvm.paging.tables import PageTables, TableAddresses
from pykvm.sizes import PAGE_SIZE


def host_address(address: int) -> int:
    """Return the HPA behind a page that this process maps and has written to.

    Source: /proc/self/pagemap, Documentation/admin-guide/mm/pagemap.rst.
    """
    file = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        (entry,) = struct.unpack("<Q", os.pread(file, 8, address // PAGE_SIZE * 8))
    finally:
        os.close(file)
    frame: int = entry & (1 << 55) - 1
    assert entry >> 63, f"{address:#x} is not in memory"
    assert frame, "only root is told frame numbers"
    return frame * PAGE_SIZE + address % PAGE_SIZE


def guest_page(memory: GuestMemory, gpa: int) -> int:
    """Return the HPA of a page of a guest's memory."""
    memory.write(gpa, memory.read(gpa, 1))  # fault the page in
    return host_address(memory.region_at(gpa).host_address + gpa - memory.region_at(gpa).gpa)


def forge_ept(guest: BareGuest, at: int, pages: dict[int, int]) -> int:
    """Write an EPT into the guest's own memory.

    Args:
        at: GPA of the first table.
        pages: GPA to HPA; each page is readable, writable and executable.

    Returns:
        The EPTP.
    """
    tables: PageTables[EptEntry] = PageTables(EptEntry, TableAddresses(0, 16 * PAGE_SIZE))
    for gpa, hpa in pages.items():
        tables.map(gpa, hpa, PAGE_SIZE, Access.READ | Access.WRITE | Access.EXECUTE)
    frames = [guest_page(guest.memory, at + n * PAGE_SIZE) for n in range(len(tables))]
    for number in range(len(tables)):
        words = list(tables.table(number))
        if tables.level(number) > 1:  # entries that point to tables: replace page numbers by HPAs
            words = [w and (w & 0xFFF) | frames[w >> 12] for w in words]
        guest.memory.write(at + number * PAGE_SIZE, struct.pack("<512Q", *words))
    return int(EPTP.of(frames[0]))
