"""GCC for code that runs without an operating system: bare-metal guests and shared objects.

Results are cached by content: sources, the headers that they include, linker script and options.
The compiler's version is not part of the key, so that a machine without a compiler (the emulated
host) can use what was built elsewhere. Remove the cache after an upgrade of GCC.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.resources import GUEST_SOURCES

__all__ = [
    "CompileError",
    "CompilerMissingError",
    "LinkError",
    "SourceMissingError",
    "build",
    "compile_source",
    "link",
    "run_gcc",
]

_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.MULTILINE)

# No SSE: a crossing does not save a guest's vector registers, and these guests never enable SSE.
# No red zone: an exception would overwrite it. No CET landing pads: nothing checks them.
_COMMON_FLAGS: Final = (
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-nostdlib",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-ffunction-sections",
    "-fdata-sections",
)
OBJECT_FLAGS: Final = ("-fPIE", "-fvisibility=hidden", "-fno-jump-tables")
"""Options for shared objects, which run at any crossing base, and may have no indirect branch that
a guest could train."""
RETURN_THUNK_FLAGS: Final = ("-mfunction-return=thunk-inline",)
"""Options for objects on processors on which a guest could train returns: each return is preceded
by a call of its own, so that the return stack is never empty and the prediction is that call's."""


class CompilerMissingError(PykvmError):
    """No compiler on this machine, while the cache does not have the result."""


class SourceMissingError(PykvmError):
    """A source file that does not exist."""


class CompileError(PykvmError):
    """A source that GCC refuses; the message has GCC's own."""


class LinkError(PykvmError):
    """Object files that the linker refuses; the message has the linker's own."""


def build(
    kind: str,
    sources: Sequence[Path],
    script: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    defines: Mapping[str, str | int] | None = None,
) -> Path:
    """Compile sources, link them, and return the cached ELF file.

    Args:
        kind: kind of the cache entry, the name of a directory.
        sources: C and assembly sources.
        script: linker script.
        include: directories in which headers are looked up.
        flags: options of the compiler, in addition to those of all freestanding code.
        defines: preprocessor macros; those whose value is a number are linker symbols too.

    Raises:
        SourceMissingError: a source does not exist.
        CompileError: GCC refuses a source.
        LinkError: the linker refuses the object files.
        CompilerMissingError: there is no GCC, and the result is not in the cache.
        CacheError: the cache cannot be written.
    """
    values = dict(sorted((defines or {}).items()))

    def make(directory: Path) -> None:
        compiled = [
            compile_source(
                source, directory / f"{index}.o", include=include, flags=flags, defines=values
            )
            for index, source in enumerate(sources)
        ]
        link(compiled, script, directory / "image.elf", symbols=values)
        for file in compiled:
            file.unlink()

    key = content_key(sources, script, flags, values, include=include)
    return cache.entry(kind, key, make) / "image.elf"


def content_key(
    sources: Sequence[Path],
    script: Path,
    flags: Sequence[str],
    defines: Mapping[str, str | int],
    *,
    include: Sequence[Path] = (),
) -> str:
    """Return the cache key of a build: everything that decides its result, but no directory.

    Headers are found by following ``#include`` lines with literal names, in the folder of the file
    that has the line and in the directories of `include`.

    Raises:
        SourceMissingError: a source does not exist.
    """
    parts: list[bytes | str | int | Path] = [*_COMMON_FLAGS, *flags, script]
    for name, value in sorted(defines.items()):
        parts += [name, value]
    for source in sources:
        if not source.is_file():
            raise SourceMissingError(f"no source file {source}", "check its name")
        parts += [source.name, source]
        parts += [part for header in _headers(source, include) for part in (header.name, header)]
    return cache.key(*parts)


def compile_source(
    source: Path,
    target: Path,
    *,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    defines: Mapping[str, str | int] | None = None,
) -> Path:
    """Compile one C or assembly source into the object file `target`, and return that.

    Raises:
        CompileError: GCC refuses the source.
        CompilerMissingError: there is no GCC.
    """
    done = run_gcc(
        [
            *("-c", *_COMMON_FLAGS, *flags),
            *(f"-D{name}={value}" for name, value in (defines or {}).items()),
            *(f"-I{directory}" for directory in include),
            # __FILE__ must not depend on where the sources are.
            f"-fmacro-prefix-map={GUEST_SOURCES}/=",
            f"-fmacro-prefix-map={source.parent}/=",
            *(str(source), "-o", str(target)),
        ]
    )
    if done.returncode:
        raise CompileError(f"cannot compile {source.name}; gcc says:\n{done.stderr.rstrip()}")
    return target


def link(
    files: Iterable[Path],
    script: Path,
    target: Path,
    *,
    symbols: Mapping[str, str | int] | None = None,
) -> Path:
    """Link `files` statically with the linker script `script` into `target`, and return that.

    Raises:
        LinkError: the linker refuses the files.
        CompilerMissingError: there is no GCC.
    """
    numbers = {name: value for name, value in (symbols or {}).items() if isinstance(value, int)}
    done = run_gcc(
        [
            *("-static", "-nostdlib", "-no-pie", "-T", str(script)),
            *("-Wl,--gc-sections", "-Wl,--orphan-handling=error", "-Wl,--build-id=none"),
            *("-Wl,-z,max-page-size=4096", "-Wl,-z,noexecstack"),
            *(f"-Wl,--defsym={name}={value:#x}" for name, value in numbers.items() if value >= 0),
            *(*map(str, files), "-o", str(target)),
        ]
    )
    if done.returncode:
        raise LinkError(f"cannot link {target.name}; the linker says:\n{done.stderr.rstrip()}")
    return target


def run_gcc(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run GCC in an empty directory.

    Raises:
        CompilerMissingError: there is no GCC.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise CompilerMissingError("no gcc on this machine", install(["gcc"]))
    with tempfile.TemporaryDirectory(prefix="pykvm-gcc-") as directory:
        return subprocess.run(
            [gcc, *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


def _headers(source: Path, include: Sequence[Path]) -> list[Path]:
    """Return all headers that `source` includes, directly or not, but the compiler's own."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for name in _INCLUDE.findall(file.read_text(errors="replace")):
            for directory in (file.parent, *include):
                header = directory / name
                if header.is_file():
                    if header not in found:
                        found.append(header)
                        waiting.append(header)
                    break
    return sorted(found)
