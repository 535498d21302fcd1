"""A strict reader for the ELF files that our own toolchain produces.

Little-endian 64-bit x86 files only (System V ABI, AMD64 supplement). Every offset is checked
against the file's size, so a truncated or foreign file is one clear error and never a partial
image. Whoever needs more of ELF than segments, sections and symbols should use a library.
"""

import struct
from dataclasses import dataclass
from typing import Final

from pykvm.errors import PykvmError

__all__ = ["ElfError", "ElfFile", "Section", "Segment", "Symbol"]

PF_X: Final = 1
PF_W: Final = 2
PF_R: Final = 4
SHF_WRITE: Final = 1
SHF_ALLOC: Final = 2
SHF_EXECINSTR: Final = 4
SHN_LORESERVE: Final = 0xFF00  # symbols from here on are numbers, not places
SHT_SYMTAB: Final = 2
SHT_RELA: Final = 4
SHT_NOBITS: Final = 8

_PT_LOAD: Final = 1
_EM_X86_64: Final = 62
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")


class ElfError(PykvmError):
    """The file is not a whole little-endian ELF64 file for x86-64."""


@dataclass(frozen=True)
class Segment:
    """One loadable segment: `data` at `address`, then zeros up to `size` bytes."""

    address: int
    size: int
    flags: int
    data: bytes


@dataclass(frozen=True)
class Section:
    """One section; `data` is empty where the file holds none (bss).

    `link` and `info` mean what the section's type says (a relocation section: its symbol table
    and the section it applies to).
    """

    name: str
    type: int
    flags: int
    address: int
    size: int
    link: int
    info: int
    data: bytes


@dataclass(frozen=True)
class Symbol:
    """One symbol, named or not, in the table's order; `section` is 0 for an undefined one."""

    name: str
    address: int
    size: int
    section: int


@dataclass(frozen=True)
class ElfFile:
    """What one ELF file holds, read completely and checked."""

    entry: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]

    @classmethod
    def parse(cls, data: bytes, name: str = "image") -> "ElfFile":
        """Read the file's content `data`; `name` stands in messages.

        Raises:
            ElfError: not ELF, another machine's, or shorter than its headers say.
        """
        try:
            return _parse(data)
        except _Malformed as error:
            raise ElfError(f"{name}: {error}", "build it again") from None

    def address_of(self, symbol: str) -> int:
        """The address of a defined symbol.

        Raises:
            ElfError: no such symbol is defined.
        """
        for candidate in self.symbols:
            if candidate.name == symbol and candidate.section:
                return candidate.address
        raise ElfError(f"symbol {symbol} is not defined", "define it in one of the sources")

    def section(self, name: str) -> Section:
        """The section of that name.

        Raises:
            ElfError: there is none.
        """
        for candidate in self.sections:
            if candidate.name == name:
                return candidate
        raise ElfError(f"no section {name}", "check the linker script")


class _Malformed(Exception):
    pass


def _parse(data: bytes) -> ElfFile:
    if len(data) < _HEADER.size or data[:4] != b"\x7fELF":
        raise _Malformed("not an ELF file, or cut off in its header")
    header = _HEADER.unpack_from(data)
    if header[0][4:6] != b"\x02\x01" or header[2] != _EM_X86_64:
        raise _Malformed("not a 64-bit x86 ELF file")
    entry, program_offset, section_offset = header[4:7]
    program_size, program_count, section_size, section_count, names_index = header[9:14]
    if program_count and program_size != _PROGRAM.size:
        raise _Malformed("program headers of an unknown size")
    if section_count and section_size != _SECTION.size:
        raise _Malformed("section headers of an unknown size")
    segments = []
    for index in range(program_count):
        raw = _cut(data, program_offset + index * _PROGRAM.size, _PROGRAM.size, "program header")
        kind, flags, offset, address, _, file_size, size, _ = _PROGRAM.unpack(raw)
        if kind != _PT_LOAD or size == 0:
            continue
        if file_size > size:
            raise _Malformed("a segment is larger in the file than in memory")
        segments.append(Segment(address, size, flags, _cut(data, offset, file_size, "segment")))
    headers = [
        _SECTION.unpack(
            _cut(data, section_offset + index * _SECTION.size, _SECTION.size, "section header")
        )
        for index in range(section_count)
    ]
    contents = [
        b"" if header[1] in (0, SHT_NOBITS) else _cut(data, header[4], header[5], "section")
        for header in headers
    ]
    if section_count and names_index >= section_count:
        raise _Malformed("no section names")
    sections = [
        Section(
            _string(contents[names_index], header[0]),
            header[1],
            header[2],
            header[3],
            header[5],
            header[6],
            header[7],
            content,
        )
        for header, content in zip(headers, contents, strict=True)
    ]
    symbols = []
    for header, content in zip(headers, contents, strict=True):
        if header[1] != SHT_SYMTAB:
            continue
        if header[6] >= section_count or len(content) % _SYMBOL.size:
            raise _Malformed("the symbol table is damaged")
        for name, _, _, section, address, size in _SYMBOL.iter_unpack(content):
            symbols.append(Symbol(_string(contents[header[6]], name), address, size, section))
    return ElfFile(entry, tuple(segments), tuple(sections), tuple(symbols))


def _cut(data: bytes, offset: int, size: int, what: str) -> bytes:
    if offset + size > len(data):
        raise _Malformed(f"the file ends inside a {what}")
    return data[offset : offset + size]


def _string(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    if offset >= len(table) or end < 0:
        raise _Malformed("a name lies outside its string table")
    return table[offset:end].decode("ascii", "replace")
