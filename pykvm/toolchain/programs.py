"""Static programs for Linux guests, compiled by GCC with the C library, and cached by content."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.toolchain.compiler import CompileError, SourceMissingError, run_gcc

__all__ = ["build_program"]

_FLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-s")


def build_program(kind: str, source: Path, flags: Sequence[str] = ()) -> Path:
    """Compile one C source into a program that needs no file of its guest; return the cached file.

    Args:
        kind: kind of the cache entry, the name of a directory.
        source: the source; it includes nothing of the project's.
        flags: further options of the compiler.

    Raises:
        SourceMissingError: there is no such source.
        CompileError: GCC refuses it.
        CompilerMissingError: there is no GCC, and the result is not in the cache.
        CacheError: the cache cannot be written.
    """
    if not source.is_file():
        raise SourceMissingError(f"no source file {source}", "check its name")

    def make(directory: Path) -> None:
        target = directory / source.stem
        done = run_gcc([*_FLAGS, *flags, str(source), "-o", str(target)])
        if done.returncode:
            raise CompileError(f"cannot compile {source.name}; gcc says:\n{done.stderr.rstrip()}")

    key = cache.key(*_FLAGS, *flags, source.name, source)
    return cache.entry(kind, key, make) / source.stem
