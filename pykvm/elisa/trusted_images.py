"""Build of the trusted images: the crossing's pages, and objects linked with the sub entry page.

An image is position independent: offsets are relative to the start of the crossing area
(`pykvm.elisa.crossing`). Sources that break the rules for objects are refused here, before anything
reaches a guest, with an error class for each rule.
"""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.elisa import (
    crossing,
    data_flow,
    instruction_effects,
    masked_indices,
    object_code,
    operations,
)
from pykvm.elisa.object_code import (
    VMFUNC,
    ForbiddenInstructionError,
    IndirectBranchError,
    StrayBranchError,
    find_vmfunc,
)
from pykvm.elisa.protections import (
    ALL,
    NOTHING_EXTRA,
    Extra,
    Protection,
    Without,
    defines,
)
from pykvm.errors import PykvmError
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain import compiler, elf
from pykvm.toolchain.elf import ElfFile

__all__ = [
    "VMFUNC",
    "AbsoluteAddressError",
    "CrossingImages",
    "ForbiddenInstructionError",
    "ForeignVmfuncError",
    "ImagePart",
    "ImageTooLargeError",
    "IndirectBranchError",
    "MissingEntryError",
    "StrayBranchError",
    "SubImage",
    "UndefinedSymbolError",
    "WritableCodeError",
    "build_object",
    "crossing_images",
]

_CROSSING: Final = GUEST_SOURCES / "crossing"
_INCLUDE: Final = (GUEST_SOURCES / "include",)
_RULES: Final = tuple(
    Path(str(module.__file__))
    for module in (object_code, masked_indices, instruction_effects, data_flow, operations)
)
_OFFSETS: Final = (
    "ENTRY_OFFSET",
    "GATE_OFFSET",
    "SUB_ENTRY_OFFSET",
    "RETURN_OFFSET",
    "LIST_OFFSET",
    "GATE_LIST_OFFSET",
    "GATE_DATA_OFFSET",
    "ENV_OFFSET",
    "STACK_OFFSET",
    "STACK_SIZE",
    "IMAGE_OFFSET",
)

# Relocations that need only the distance between two places of the image (AMD64 supplement 4.4).
_RELATIVE: Final = frozenset({2, 4, 24})  # R_X86_64_PC32, PLT32, PC64


class MissingEntryError(PykvmError):
    """An object without a source that defines ``elisa_serve``."""


class UndefinedSymbolError(PykvmError):
    """An object that uses a symbol which none of its sources defines."""


class AbsoluteAddressError(PykvmError):
    """An object that needs an absolute address, which a position-independent image cannot have."""


class WritableCodeError(PykvmError):
    """A section that is writable and executable."""


class ForeignVmfuncError(PykvmError):
    """Bytes of a VMFUNC instruction anywhere but at the end of their page."""


class ImageTooLargeError(PykvmError):
    """Code and data that do not fit between the image's start and the shared memory."""


@dataclass(frozen=True)
class ImagePart:
    """Whole pages of one kind.

    Attributes:
        offset: offset of the first byte from the start of the crossing area.
        data: their bytes.
        writable: whether contexts map them writable.
        executable: whether contexts map them executable.
    """

    offset: int
    data: bytes
    writable: bool
    executable: bool

    def pages(self) -> list[tuple[int, bytes]]:
        """Return the offset and the 4096 bytes of each page."""
        return [
            (self.offset + start, self.data[start : start + PAGE_SIZE])
            for start in range(0, len(self.data), PAGE_SIZE)
        ]


@dataclass(frozen=True)
class SubImage:
    """Image of a shared object. No part of it is writable and executable.

    Attributes:
        parts: sub entry page, text, read-only data and data, in this order, without empty ones.
        symbols: offsets from the start of the crossing area, by name.
    """

    parts: tuple[ImagePart, ...]
    symbols: dict[str, int]


@dataclass(frozen=True)
class CrossingImages:
    """The pages of the crossing that all objects share, 4096 bytes each.

    Attributes:
        entry_page: entry page, the guest's own.
        gate_page: gate page.
        return_page: return page, the guest's own.
        call_offset: offset of ``elisa_call`` in the entry page.
    """

    entry_page: bytes
    gate_page: bytes
    return_page: bytes
    call_offset: int


@functools.cache  # the same for all objects of a process
def crossing_images(without: Without = ALL) -> CrossingImages:
    """Assemble entry, gate and return page.

    Args:
        without: protections to leave out, for measurements and controls only.

    Raises:
        ForeignVmfuncError: entry or gate page do not end in their only VMFUNC.
        PykvmError: see `pykvm.toolchain.compiler.build`.
    """
    path = compiler.build(
        "crossing",
        [_CROSSING / name for name in ("entry.S", "gate.S", "return.S")],
        _CROSSING / "pages.ld",
        defines={**_offsets(), **defines(without, NOTHING_EXTRA)},
    )
    image = ElfFile.parse(path.read_bytes(), "crossing")
    entry, gate, back = (image.section(f".elisa.{n}").data for n in ("entry", "gate", "return"))
    for name, page, official in (
        ("entry page", entry, [PAGE_SIZE - 3]),
        ("gate page", gate, [PAGE_SIZE - 3]),
        ("return page", back, []),
    ):
        _check_vmfunc(name, [(0, page)], official)
    return CrossingImages(entry, gate, back, image.address_of("elisa_call"))


def build_object(
    sources: Sequence[Path],
    *,
    user: bool = False,
    without: Without = ALL,
    extra: Extra = NOTHING_EXTRA,
) -> SubImage:
    """Compile an object's sources and link them with the sub entry page; cached by content.

    Args:
        sources: C and assembly sources; they include "elisa_object.h" and define ``elisa_serve``.
        user: whether to take the sub entry page for callers in user mode; nothing else differs.
        without: protections to leave out, for measurements and controls only.
        extra: protections to add, for weak processors.

    Raises:
        MissingEntryError: no source defines ``elisa_serve``.
        UndefinedSymbolError: no source defines a symbol that one of them uses.
        AbsoluteAddressError: the code needs an absolute address.
        WritableCodeError: a section is writable and executable.
        ForeignVmfuncError: the bytes of VMFUNC occur in the object.
        ImageTooLargeError: code and data are too large.
        PykvmError: see `pykvm.toolchain.compiler.build`,
            `pykvm.elisa.object_code.check_instructions` and
            `pykvm.elisa.masked_indices.check_masked_indices`.
    """
    sources = [source.resolve() for source in sources]  # the compiler runs elsewhere
    name = sources[0].name if sources else "object"
    inputs = [*sources, _CROSSING / "sub.S"]
    script = _CROSSING / "object.ld"
    offsets = _offsets()
    macros = {**offsets, **defines(without, extra), **({"ELISA_USER": 1} if user else {})}
    thunks = compiler.RETURN_THUNK_FLAGS if Protection.RETURN_THUNKS in extra else ()
    flags = (*compiler.OBJECT_FLAGS, *thunks)
    checked = Protection.CODE_CHECK not in without

    def make(directory: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="pykvm-object-") as scratch:
            names = [*map(str, range(len(sources))), "sub-entry"]  # object.ld knows the last
            compiled = [
                compiler.compile_source(
                    source,
                    Path(scratch) / f"{file}.o",
                    include=_INCLUDE,
                    flags=flags,
                    defines=macros,
                )
                for source, file in zip(inputs, names, strict=True)
            ]
            _check_compiled(inputs, [ElfFile.parse(file.read_bytes()) for file in compiled])
            linked = Path(scratch) / "image.elf"
            compiler.link(compiled, script, linked, symbols=offsets)
            image = _sub_image(ElfFile.parse(linked.read_bytes(), name), name)
            if checked:
                object_code.check_instructions(linked, name)
                masked_indices.check_masked_indices(linked, name, image.symbols["elisa_serve"])
            (directory / "image.elf").write_bytes(linked.read_bytes())

    rules = _RULES if checked else ()  # what was refused by older ones is refused again
    key = compiler.content_key([*inputs, *rules], script, flags, macros, include=_INCLUDE)
    path = cache.entry("object", key, make) / "image.elf"
    return _sub_image(ElfFile.parse(path.read_bytes(), name), name)


def _offsets() -> dict[str, str | int]:
    """Return the crossing's offsets as macros and linker symbols, such as ELISA_ENTRY_OFFSET."""
    return {f"ELISA_{name}": getattr(crossing, name) for name in _OFFSETS}


def _check_compiled(sources: Sequence[Path], files: Sequence[ElfFile]) -> None:
    """Refuse objects for causes that can be told more clearly before linking than after it."""
    defined = {symbol.name for file in files for symbol in file.symbols if symbol.section}
    if "elisa_serve" not in defined:
        raise MissingEntryError(
            f"{sources[0].name} does not define elisa_serve",
            "define it as guest/include/elisa_object.h declares it",
        )
    size = 0
    for source, file in zip(sources, files, strict=True):
        for symbol in file.symbols:
            if symbol.name and symbol.section == 0 and symbol.name not in defined:
                raise UndefinedSymbolError(
                    f"{source.name} needs {symbol.name}, which no source of the object defines",
                    "add a source that defines it: a sub context has no C library",
                )
        for section in file.sections:
            if not section.flags & elf.SHF_ALLOC:
                continue
            size += section.size
            if section.flags & elf.SHF_WRITE and section.flags & elf.SHF_EXECINSTR:
                raise WritableCodeError(
                    f"section {section.name} of {source.name} is writable and executable",
                    "drop one of the flags w and x",
                )
        _check_relocations(source, file)
    _check_size(sources[0].name, size)


def _check_relocations(source: Path, file: ElfFile) -> None:
    for section in file.sections:
        if section.type != elf.SHT_RELA:
            continue
        target = file.sections[section.info]
        if not target.flags & elf.SHF_ALLOC:
            continue
        for offset in range(0, len(section.data), 24):  # Elf64_Rela: r_offset, r_info, r_addend
            info = int.from_bytes(section.data[offset + 8 : offset + 16], "little")
            if info & 0xFFFFFFFF not in _RELATIVE:
                symbol = file.symbols[info >> 32]
                what = symbol.name or file.sections[symbol.section].name
                raise AbsoluteAddressError(
                    f"section {target.name} of {source.name} holds an absolute address ({what})",
                    "use an index or a distance in place of the pointer",
                )


def _check_size(name: str, size: int) -> None:
    if size > crossing.IMAGE_MAX_SIZE:
        raise ImageTooLargeError(
            f"{name} takes {size} bytes of code and data, {crossing.IMAGE_MAX_SIZE} fit",
            "put large data into the object's shared memory",
        )


def _check_vmfunc(name: str, parts: Sequence[tuple[int, bytes]], official: Sequence[int]) -> None:
    found = find_vmfunc(parts)
    if found != list(official):
        wrong = sorted(set(found) ^ set(official))[0]
        raise ForeignVmfuncError(
            f"the bytes 0f 01 d4 (vmfunc) are not where they belong in {name}: offset {wrong:#x}",
            "change the instruction or the constant that holds them",
        )


def _sub_image(image: ElfFile, name: str) -> SubImage:
    parts = []
    for segment in image.segments:
        size = -(-segment.size // PAGE_SIZE) * PAGE_SIZE
        executable = bool(segment.flags & elf.PF_X)
        # After the last instruction of a code page comes int3, as everywhere in trusted pages.
        fill = b"\xcc" if executable else b"\0"
        data = segment.data.ljust(segment.size, b"\0").ljust(size, fill)
        part = ImagePart(segment.address, data, bool(segment.flags & elf.PF_W), executable)
        if part.offset % PAGE_SIZE:
            raise ValueError(f"segment at {part.offset:#x}: object.ld has to align it to a page")
        if part.writable and part.executable:
            raise WritableCodeError(
                f"{name} has a writable and executable segment", "separate them"
            )
        parts.append(part)
    _check_vmfunc(
        name,
        [(part.offset, part.data) for part in parts if part.executable],
        [crossing.SUB_ENTRY_OFFSET + PAGE_SIZE - len(VMFUNC)],
    )
    end = max(part.offset + len(part.data) for part in parts)
    _check_size(name, end - crossing.IMAGE_OFFSET)
    symbols = {
        symbol.name: symbol.address
        for symbol in image.symbols
        if symbol.name and 0 < symbol.section < elf.SHN_LORESERVE
    }
    return SubImage(tuple(parts), symbols)
