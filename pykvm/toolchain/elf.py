"""A strict reader of the ELF files that this toolchain produces.

It reads segments, sections and symbols of little-endian 64-bit x86 files (System V ABI, AMD64
supplement). Every offset is checked against the file's size, so a truncated or foreign file is one
clear error and never a partial image.
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
SHN_LORESERVE: Final = 0xFF00  # from here on a symbol's section is a special value
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
    """A file that is not a complete little-endian ELF64 file for x86-64."""


@dataclass(frozen=True)
class Segment:
    """A loadable segment.

    Attributes:
        address: address of the first byte.
        size: bytes in memory; those beyond `data` are zero.
        flags: `PF_R`, `PF_W` and `PF_X`.
        data: bytes in the file.
    """

    address: int
    size: int
    flags: int
    data: bytes


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        name: its name.
        type: ``SHT_*``.
        flags: ``SHF_*``.
        address: address of the first byte.
        size: bytes in memory.
        link: depends on the type; of a relocation section, the symbol table's index.
        info: depends on the type; of a relocation section, the index of the section it applies to.
        data: bytes in the file; empty if the file has none (bss).
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
    """A symbol.

    Attributes:
        name: its name, which may be empty.
        address: its value.
        size: bytes.
        section: index of its section; 0 if the symbol is undefined.
    """

    name: str
    address: int
    size: int
    section: int


@dataclass(frozen=True)
class ElfFile:
    """Content of an ELF file, read completely and checked.

    Attributes:
        entry: address of the first instruction.
        segments: the loadable segments.
        sections: all sections, by index.
        symbols: all symbols, in the order of the table.
    """

    entry: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]

    @classmethod
    def parse(cls, data: bytes, name: str = "image") -> "ElfFile":
        """Parse a file's content; `name` is used in messages.

        Raises:
            ElfError: the file is not ELF, is for another machine, or is truncated.
        """
        try:
            return _parse(data)
        except _Malformed as error:
            raise ElfError(f"{name}: {error}", "build it again") from None

    def address_of(self, symbol: str) -> int:
        """Return the address of a defined symbol.

        Raises:
            ElfError: no such symbol is defined.
        """
        for candidate in self.symbols:
            if candidate.name == symbol and candidate.section:
                return candidate.address
        raise ElfError(f"symbol {symbol} is not defined", "define it in one of the sources")

    def section(self, name: str) -> Section:
        """Return the section of this name.

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
