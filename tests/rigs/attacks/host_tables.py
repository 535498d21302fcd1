"""Page tables that the kernel built for a context, read from the host's memory.

Their addresses are not public. A reckless object (wild.c) reads the EPTP of its gate from the EPTP
list of the calling vCPU, and /proc/kcore shows the host's memory to root.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

from pykvm.closeable import Closeable
from pykvm.elisa import crossing
from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import Protection
from pykvm.paging.entries import ADDRESS_MASK, EPTP, EptEntry
from pykvm.paging.walk import walk
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.victim import C
from tests.rigs.probe import WILD, Wild

RECKLESS: Final = SharedObject(
    "wild", WILD, shared=16 * PAGE_SIZE, guests=2, without={Protection.CODE_CHECK}
)
"""The object that reads the list."""

_PT_LOAD: Final = 1
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
# p_paddr of segments without a physical address, such as vmalloc's (fs/proc/kcore.c).
_NOWHERE: Final = (1 << 64) - 1


class HostMemory(Closeable):
    """Host physical memory from /proc/kcore, an ELF core file of the kernel's segments."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
        header = os.pread(self._fd, 64, 0)
        assert header[:4] == b"\x7fELF"
        (first,), (count,) = (
            struct.unpack_from("<Q", header, 32),
            struct.unpack_from("<H", header, 56),
        )
        table = os.pread(self._fd, count * _PROGRAM_HEADER.size, first)
        self._segments = [
            (physical, size, offset)
            for kind, _, offset, _, physical, _, size, _ in _PROGRAM_HEADER.iter_unpack(table)
            if kind == _PT_LOAD and physical != _NOWHERE
        ]

    def read(self, hpa: int, size: int) -> bytes:
        for start, length, offset in self._segments:
            if start <= hpa and hpa + size <= start + length:
                data = os.pread(self._fd, size, offset + hpa - start)
                assert len(data) == size, f"{hpa:#x} cannot be read"
                return data
        raise AssertionError(f"{hpa:#x} is no memory of this host")

    def table(self, hpa: int) -> Sequence[int]:
        """Return the 512 words of a page."""
        return struct.unpack("<512Q", self.read(hpa & ADDRESS_MASK, PAGE_SIZE))

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(frozen=True)
class HostTables:
    """An EPT of four levels: every table by its HPA, with its level."""

    memory: HostMemory
    eptp: EPTP
    levels: dict[int, int]

    @classmethod
    def read(cls, memory: HostMemory, eptp: int) -> Self:
        levels: dict[int, int] = {}
        waiting = [(eptp & ADDRESS_MASK, 4)]
        while waiting:
            table, level = waiting.pop()
            if levels.setdefault(table, level) != level:
                raise AssertionError(f"the table at {table:#x} is used at two levels")
            for word in set(memory.table(table)) if level > 1 else ():
                entry = EptEntry(word)
                if entry.present:
                    assert not entry.is_leaf(level), f"a large page in {table:#x}"
                    if levels.get(entry.address) != level - 1:
                        waiting.append((entry.address, level - 1))
        return cls(memory, EPTP(eptp), levels)

    @cached_property
    def leaves(self) -> list[EptEntry]:
        """All present leaves of all tables."""
        last = [table for table, level in self.levels.items() if level == 1]
        words = (word for table in last for word in self.memory.table(table))
        return [EptEntry(word) for word in words if EptEntry(word).present]

    def page(self, gpa: int) -> int:
        """Return the HPA that a GPA maps to."""
        found = walk(self.eptp.address, gpa, EptEntry, self.memory.table)
        assert found.target is not None, found
        return found.target


def read_list(slot: int) -> tuple[int, int]:
    """Return the arguments with which wild.c reads a slot of its caller's EPTP list."""
    return Wild.READ, C + crossing.LIST_OFFSET + 8 * slot


def both_contexts(memory: HostMemory, gate_eptp: int) -> tuple[HostTables, HostTables]:
    """Return the gate and the sub context of a gate's EPTP.

    The gate's data page holds the sub context's EPTP.
    """
    gate = HostTables.read(memory, gate_eptp)
    data = gate.page(crossing.GATE_PRIVATE_GPA + crossing.GATE_DATA_OFFSET)
    return gate, HostTables.read(memory, memory.table(data)[0])
