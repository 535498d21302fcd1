"""Entries of EPT and x86 page tables, and the EPTP, as integers with named bit ranges.

An entry is an `int`, so that it can be stored and compared as one; `str()` decodes it. Level 1 is
the lowest: its leaves map 4 KiB, those of level 2 map 2 MiB, and those of level 3 map 1 GiB.

Sources: SDM vol. 3C 29.3.2 (EPT entries), 25.6.11 (EPTP), vol. 3A 4.5 (4- and 5-level paging).
"""

import enum
from abc import abstractmethod
from typing import ClassVar, Final, Self, overload

from pykvm.errors import PykvmError

__all__ = [
    "ADDRESS_MASK",
    "ENTRIES",
    "EPTP",
    "SIZE_1G",
    "SIZE_2M",
    "SIZE_4K",
    "Access",
    "Entry",
    "EntryError",
    "EptEntry",
    "Field",
    "MemoryType",
    "Word",
    "X86Entry",
    "page_size",
    "size_name",
]

ENTRIES: Final = 512  # in one table
ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000  # bits 12 to 51

SIZE_4K: Final = 1 << 12
SIZE_2M: Final = 1 << 21
SIZE_1G: Final = 1 << 30


class EntryError(PykvmError, ValueError):
    """An entry that the processor would refuse."""


class Access(enum.IntFlag):
    """Accesses that a mapping allows; EPT entries have no USER."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4
    USER = 8


class MemoryType(enum.IntEnum):
    """Memory types, by their encoding in EPT entries (SDM vol. 3C 29.3.7).

    The encodings 2, 3 and 7 are reserved.
    """

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6


def page_size(level: int) -> int:
    """Return how many bytes one entry of a table of this level spans."""
    return 1 << (3 + 9 * level)


def size_name(size: int) -> str:
    """Return the short form of a size in bytes, such as 4K, 2M or 1G."""
    for shift, letter in ((30, "G"), (20, "M"), (10, "K")):
        if size >> shift and not size & ((1 << shift) - 1):
            return f"{size >> shift}{letter}"
    return str(size)


class Field:
    """Descriptor for the bits `low` to `high` of a `Word`, both included; `high` defaults to `low`.

    Access through a word returns the value of the bits; access through the class returns the
    descriptor.
    """

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low = low
        self.high = low if high is None else high
        self.mask = ((1 << (self.high - low + 1)) - 1) << low

    @overload
    def __get__(self, word: None, owner: type) -> Self: ...
    @overload
    def __get__(self, word: "Word", owner: type) -> int: ...
    def __get__(self, word: "Word | None", owner: type) -> "Self | int":
        return self if word is None else (int(word) & self.mask) >> self.low


class Word(int):
    """A 64-bit word with named bit ranges.

    Raises:
        EntryError: the value is negative or has more than 64 bits.
    """

    def __new__(cls, value: int = 0) -> Self:
        if not 0 <= value < 1 << 64:
            raise EntryError(f"{value:#x} is no 64-bit word", "use 0 to 2^64 - 1")
        return super().__new__(cls, value)

    @property
    def address(self) -> int:
        """Bits 12 to 51 in place: an address, or an index times 4096."""
        return int(self) & ADDRESS_MASK

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self):#x})"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)

    # Hash and comparisons are those of int, so a word read back equals the one written.


class Entry(Word):
    """Base class for EPT and x86 entries: the interface of the builder and the walker."""

    TABLE_ACCESS: ClassVar[Access]  # default of entries above the leaves: the leaf decides
    SPACE: ClassVar[str]  # name of the addresses that the tables translate
    TARGET: ClassVar[str]  # name of the addresses that they translate to

    @classmethod
    @abstractmethod
    def leaf(
        cls, level: int, address: int, access: Access, memory_type: MemoryType = MemoryType.WB
    ) -> Self:
        """Create an entry that maps the page of this level at `address`.

        Raises:
            EntryError: the processor would refuse the entry.
        """

    @classmethod
    @abstractmethod
    def table(cls, address: int, access: Access | None = None) -> Self:
        """Create an entry that leads to the table at `address`.

        Args:
            address: address of the table, or its number times 4096.
            access: what the entry allows, `TABLE_ACCESS` by default.

        Raises:
            EntryError: the processor would refuse the entry.
        """

    @property
    @abstractmethod
    def present(self) -> bool:
        """True if the entry is present, so that the processor's walk continues."""

    @abstractmethod
    def is_leaf(self, level: int) -> bool:
        """Return whether this entry, present in a table of this level, maps a page."""

    @property
    @abstractmethod
    def access(self) -> Access:
        """Accesses that this entry allows; a walk allows those that all its entries allow."""

    @abstractmethod
    def memory_type_of(self, level: int) -> MemoryType | None:
        """Return the memory type of a leaf, or None if the encoding is reserved."""

    @abstractmethod
    def faults(self, level: int, physical_bits: int = 52) -> tuple[str, ...]:
        """Return why the processor would refuse this present entry in a table of this level.

        Args:
            level: level of the table that holds the entry.
            physical_bits: the processor's physical address width; with 52 no address is refused.
        """

    @classmethod
    @abstractmethod
    def access_name(cls, access: Access) -> str:
        """Return the short form of an access, such as r-x."""

    @property
    def leaf_flags(self) -> str:
        """Text that `decode` appends for a leaf."""
        return ""

    def target(self, level: int) -> int:
        """Return the address of the page that a leaf of this level maps."""
        return self.address & ~(page_size(level) - 1)

    def decode(self, level: int) -> str:
        """Decode the entry of a table of this level.

        Returns:
            Text such as ``0x7000 [r-x WB 4K]``, ``table 0x3000 [rwx]`` or ``absent``.
        """
        if not self.present:
            return "absent" if not self else f"absent ({int(self):#x})"
        faults = self.faults(level)
        if faults:
            return f"invalid {int(self):#x}: {', '.join(faults)}"
        if not self.is_leaf(level):
            return f"table {self.address:#x} [{self.access_name(self.access)}]"
        kind = self.memory_type_of(level)
        return (
            f"{self.target(level):#x} [{self.access_name(self.access)} "
            f"{kind.name if kind is not None else '?'} {size_name(page_size(level))}"
            f"{self.leaf_flags}]"
        )

    def __str__(self) -> str:
        return self.decode(1)

    @classmethod
    def _checked(cls, value: int, level: int) -> Self:
        entry = cls(value)
        faults = entry.faults(level)
        if faults:
            raise EntryError(f"{cls.__name__} {value:#x} at level {level}: {', '.join(faults)}")
        return entry


def _address_faults(entry: Entry, level: int, low: int, physical_bits: int) -> list[str]:
    """Return the reserved address bits that are set: `low` up to the page size, above the width."""
    faults = []
    if entry.is_leaf(level):
        below = (page_size(level) - 1) & ~((1 << low) - 1)
        if int(entry) & below:
            faults.append(f"bits {low} to {page_size(level).bit_length() - 2} are reserved")
    if entry.address >> physical_bits:
        faults.append(f"address {entry.address:#x} needs more than {physical_bits} bits")
    return faults


class EptEntry(Entry):
    """An EPT entry of any level (SDM vol. 3C 29.3.2, tables 29-1 to 29-7)."""

    TABLE_ACCESS = Access.READ | Access.WRITE | Access.EXECUTE
    SPACE = "GPA"
    TARGET = "HPA"

    read = Field(0)
    write = Field(1)
    execute = Field(2)  #: in supervisor mode only, where mode-based execute control is on
    memory_type = Field(3, 5)  #: leaves only; reserved in the others
    ignore_pat = Field(6)  #: leaves only; the kernel sets it in contexts (kernel-patches/README.md)
    large = Field(7)  #: levels 2 and 3: the entry is a leaf
    accessed = Field(8)  #: used if the EPTP enables accessed and dirty flags
    dirty = Field(9)
    user_execute = Field(10)  #: used with mode-based execute control
    suppress_ve = Field(63)  #: used with EPT-violation #VE

    @classmethod
    def leaf(
        cls, level: int, address: int, access: Access, memory_type: MemoryType = MemoryType.WB
    ) -> Self:
        if not 1 <= level <= 3:
            raise EntryError(f"no pages at level {level}", "use level 1, 2 or 3")
        if access & Access.USER or not access:
            raise EntryError(f"{access!r} in an EPT entry", "use READ, WRITE and EXECUTE")
        value = address | int(access) | memory_type << 3 | (level > 1) << 7
        if address & ~ADDRESS_MASK:
            raise EntryError(f"address {address:#x}", "use a page-aligned one below 2^52")
        return cls._checked(value, level)

    @classmethod
    def table(cls, address: int, access: Access | None = None) -> Self:
        access = cls.TABLE_ACCESS if access is None else access
        if address & ~ADDRESS_MASK or access & Access.USER or not access:
            raise EntryError(
                f"table at {address:#x} with {access!r}", "use an aligned address, RWX"
            )
        return cls._checked(address | int(access), 2)

    @property
    def present(self) -> bool:
        return int(self) & 7 != 0

    def is_leaf(self, level: int) -> bool:
        return level == 1 or (level <= 3 and self.large == 1)

    @property
    def leaf_flags(self) -> str:
        return " IPAT" * self.ignore_pat

    @property
    def access(self) -> Access:
        return Access(int(self) & 7)

    def memory_type_of(self, level: int) -> MemoryType | None:
        try:
            return MemoryType(self.memory_type)
        except ValueError:
            return None

    def faults(self, level: int, physical_bits: int = 52) -> tuple[str, ...]:
        """Return the causes of an EPT misconfiguration (SDM vol. 3C 29.3.3.1).

        Execute-only entries count as valid: every processor with VMFUNC supports them.
        """
        faults = []
        if self.write and not self.read:
            faults.append("writable but not readable")
        if self.is_leaf(level):
            if self.memory_type_of(level) is None:
                faults.append(f"memory type {self.memory_type} is reserved")
        elif level > 3 and int(self) & 0xF8:
            faults.append("bits 3 to 7 are reserved")
        elif int(self) & 0x78:
            faults.append("bits 3 to 6 are reserved")
        return (*faults, *_address_faults(self, level, 12, physical_bits))

    @classmethod
    def access_name(cls, access: Access) -> str:
        return "".join(
            letter if access & bit else "-"
            for letter, bit in (("r", Access.READ), ("w", Access.WRITE), ("x", Access.EXECUTE))
        )


class X86Entry(Entry):
    """An entry of 4-level or 5-level paging (SDM vol. 3A 4.5, tables 4-14 to 4-20).

    Accessed and dirty bits are set from the start. The processor then never writes to the table,
    which may lie in memory that the EPT maps read-only. A mapping with EXECUTE has NX clear, so it
    is valid with EFER.NXE off as well.
    """

    TABLE_ACCESS = Access.READ | Access.WRITE | Access.EXECUTE | Access.USER
    SPACE = "GVA"
    TARGET = "GPA"

    present_bit = Field(0)
    write = Field(1)
    user = Field(2)
    write_through = Field(3)  #: PWT
    cache_disable = Field(4)  #: PCD
    accessed = Field(5)
    dirty = Field(6)  #: leaves only
    large = Field(7)  #: levels 2 and 3: the entry is a leaf; PAT at level 1; reserved above
    is_global = Field(8)  #: leaves only
    protection_key = Field(59, 62)
    no_execute = Field(63)

    # PWT and PCD of each type with the PAT's reset value (SDM vol. 3A 12.12.4).
    _CACHE: ClassVar[dict[MemoryType, int]] = {
        MemoryType.WB: 0,
        MemoryType.WT: 0x8,
        MemoryType.UC: 0x18,
    }

    @classmethod
    def leaf(
        cls, level: int, address: int, access: Access, memory_type: MemoryType = MemoryType.WB
    ) -> Self:
        if not 1 <= level <= 3:
            raise EntryError(f"no pages at level {level}", "use level 1, 2 or 3")
        if address & ~ADDRESS_MASK:
            raise EntryError(f"address {address:#x}", "use a page-aligned one below 2^52")
        if memory_type not in cls._CACHE:
            raise EntryError(
                f"no {memory_type.name} with the PAT's reset value", "use WB, WT or UC"
            )
        # Bit 12 of a large leaf is not an address bit but PAT.
        if address & (page_size(level) - 1):
            raise EntryError(f"address {address:#x}", f"align it to {size_name(page_size(level))}")
        value = address | cls._bits(access) | 0x60 | (level > 1) << 7 | cls._CACHE[memory_type]
        return cls._checked(value, level)

    @classmethod
    def table(cls, address: int, access: Access | None = None) -> Self:
        access = cls.TABLE_ACCESS if access is None else access
        if address & ~ADDRESS_MASK:
            raise EntryError(f"table at {address:#x}", "use a page-aligned address below 2^52")
        return cls._checked(address | cls._bits(access) | 0x20, 2)

    @staticmethod
    def _bits(access: Access) -> int:
        if not access & Access.READ:
            raise EntryError(f"{access!r} in an x86 entry", "present pages can be read, add READ")
        return (
            1
            | (2 if access & Access.WRITE else 0)
            | (4 if access & Access.USER else 0)
            | (0 if access & Access.EXECUTE else 1 << 63)
        )

    @property
    def present(self) -> bool:
        return int(self) & 1 != 0

    def is_leaf(self, level: int) -> bool:
        return level == 1 or (level <= 3 and self.large == 1)

    @property
    def access(self) -> Access:
        value = int(self)
        return Access(
            value & 1
            | value & 2
            | (0 if value >> 63 else Access.EXECUTE)
            | (Access.USER if value & 4 else 0)
        )

    def memory_type_of(self, level: int) -> MemoryType | None:
        """Return the memory type by the PAT's reset value; its upper half repeats the lower."""
        return (MemoryType.WB, MemoryType.WT, MemoryType.UC, MemoryType.UC)[int(self) >> 3 & 3]

    def faults(self, level: int, physical_bits: int = 52) -> tuple[str, ...]:
        """Return the reserved bits that are set (SDM vol. 3A 4.5.4), with EFER.NXE on."""
        faults = []
        if level > 3 and self.large:
            faults.append("bit 7 is reserved")
        return (*faults, *_address_faults(self, level, 13, physical_bits))

    @classmethod
    def access_name(cls, access: Access) -> str:
        return EptEntry.access_name(access) + ("u" if access & Access.USER else "s")


class EPTP(Word):
    """An EPT pointer (SDM vol. 3C 25.6.11, table 25-9)."""

    memory_type = Field(0, 2)  #: of the processor's own accesses to the tables
    walk_length = Field(3, 5)  #: levels minus one
    access_dirty = Field(6)  #: enables accessed and dirty flags: guest walks then count as writes
    shadow_stack = Field(7)

    @classmethod
    def of(cls, address: int, levels: int = 4, access_dirty: bool = False) -> Self:
        """Create the EPTP of the root table at `address`, with write-back memory.

        Raises:
            EntryError: the address is not page-aligned and below 2^52, or `levels` not 4 or 5.
        """
        if address & ~ADDRESS_MASK or levels not in (4, 5):
            raise EntryError(f"root {address:#x} of {levels} levels", "use an aligned one, 4 or 5")
        return cls(address | MemoryType.WB | (levels - 1) << 3 | access_dirty << 6)

    @property
    def levels(self) -> int:
        return self.walk_length + 1

    def faults(self, physical_bits: int = 52) -> tuple[str, ...]:
        """Return why VM entry or VMFUNC would refuse this EPTP (SDM vol. 3C 27.2.1.1)."""
        faults = []
        if self.memory_type not in (MemoryType.UC, MemoryType.WB):
            faults.append(f"memory type {self.memory_type} is reserved")
        if self.walk_length not in (3, 4):
            faults.append(f"{self.levels} levels")
        if int(self) & 0xF00 or int(self) >> 52:
            faults.append("reserved bits are set")
        if self.address >> physical_bits:
            faults.append(f"address {self.address:#x} needs more than {physical_bits} bits")
        return tuple(faults)

    def __str__(self) -> str:
        if not self:
            return "EPTP none"
        faults = self.faults()
        if faults:
            return f"EPTP invalid {int(self):#x}: {', '.join(faults)}"
        name = MemoryType(self.memory_type).name
        flags = " A/D" * self.access_dirty + " SSS" * self.shadow_stack
        return f"EPTP {self.address:#x} [{self.levels} levels {name}{flags}]"
