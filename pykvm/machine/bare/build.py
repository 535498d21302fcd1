"""Builds bare-metal guest programs: start.S, the runtime, and a program's own sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

from pykvm.elisa import crossing
from pykvm.machine.bare import layout
from pykvm.resources import GUEST_SOURCES
from pykvm.toolchain import compiler
from pykvm.toolchain.elf import ElfFile

__all__ = ["GUEST_DEFINES", "GUEST_FLAGS", "GUEST_INCLUDE", "GuestProgram", "build_guest"]

_BARE: Final = GUEST_SOURCES / "bare"

GUEST_INCLUDE: Final = (GUEST_SOURCES / "include", _BARE)
"""Where guests' headers are looked up."""

GUEST_FLAGS: Final = ("-fno-pie",)
"""Further compiler options: a guest is linked for one address."""

GUEST_DEFINES: Final[dict[str, str | int]] = {
    "GUEST_IMAGE_GPA": layout.IMAGE_GPA,
    "ELISA_RETURN_OFFSET": crossing.RETURN_OFFSET,
}
"""The addresses that guests and their linker script know."""


@dataclass(frozen=True)
class GuestProgram:
    """A guest program of one's own, for `pykvm.machine.bare.guest.BareGuest`.

    source: a C file that includes "runtime.h" and defines `guest_main`. parameters: numbers that it
    finds in `boot_info->param`, at most `pykvm.machine.bare.boot_info.PARAMS`.
    """

    source: str | PathLike[str]
    parameters: Sequence[int] = ()

    def image(self) -> ElfFile:
        """Compile and link it, or take it from the cache; raises what `build_guest` raises."""
        return build_guest([Path(self.source).absolute()])

    def params(self) -> list[int]:
        """Return the parameters."""
        return list(self.parameters)


def build_guest(
    sources: Sequence[str | Path],
    *,
    objects: Sequence[str | Path] = (),
    defines: Mapping[str, str | int] | None = None,
) -> ElfFile:
    """Compile and link a bare-metal 64-bit guest at `layout.IMAGE_GPA`, with start.S and runtime.

    Names without a directory are looked up in guest/bare. `objects` are sources of a shared object
    to link in for direct calls, and further sources in general; they are compiled alike.

    Raises:
        SourceMissingError, CompileError, LinkError, CompilerMissingError, CacheError.
    """
    paths = [_BARE / "start.S", _BARE / "runtime.c"]
    paths += [_find(source, _BARE) for source in sources]
    paths += [_find(source, GUEST_SOURCES / "objects") for source in objects]
    image = compiler.build(
        "bare-guest",
        paths,
        _BARE / "guest.ld",
        include=GUEST_INCLUDE,
        flags=GUEST_FLAGS,
        defines={**GUEST_DEFINES, **(defines or {})},
    )
    return ElfFile.parse(image.read_bytes(), paths[-1].stem)


def _find(source: str | Path, directory: Path) -> Path:
    path = Path(source)
    return (directory / path) if path.parent == Path() and not path.is_file() else path.resolve()
