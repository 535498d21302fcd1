"""Build of bare-metal guest programs: start.S, the runtime, and a program's own sources."""

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
"""Directories of guests' headers."""

GUEST_FLAGS: Final = ("-fno-pie",)
"""Compiler options; a guest is linked for a fixed address."""

GUEST_DEFINES: Final[dict[str, str | int]] = {
    "GUEST_IMAGE_GPA": layout.IMAGE_GPA,
    "ELISA_RETURN_OFFSET": crossing.RETURN_OFFSET,
}
"""Addresses for guests' sources and their linker script."""


@dataclass(frozen=True)
class GuestProgram:
    """A guest program of the user's, for `pykvm.machine.bare.guest.BareGuest`.

    Attributes:
        source: a C file that includes "runtime.h" and defines ``guest_main``.
        parameters: numbers that the program finds in ``boot_info->param``, at most
            `pykvm.machine.bare.boot_info.PARAMS`.
    """

    source: str | PathLike[str]
    parameters: Sequence[int] = ()

    def image(self) -> ElfFile:
        """Compile and link the program, or take it from the cache.

        Raises:
            PykvmError: see `build_guest`.
        """
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
    """Compile and link a bare-metal 64-bit guest at ``layout.IMAGE_GPA``, with start.S and runtime.

    Args:
        sources: the program's sources; a name without a directory is looked up in ``guest/bare``.
        objects: sources of a shared object to link in for direct calls; a name without a directory
            is looked up in ``guest/objects``.
        defines: preprocessor macros; those whose value is a number are linker symbols too.

    Raises:
        PykvmError: see `pykvm.toolchain.compiler.build`.
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
