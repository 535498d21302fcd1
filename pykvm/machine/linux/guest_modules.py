"""Modules of a guest's kernel, from this host's `/lib/modules`, unpacked and in order."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.kernel import module_files
from pykvm.machine.linux import cpio
from pykvm.machine.linux.boot import KernelError, open_file
from pykvm.machine.linux.compression import decompress

__all__ = ["modules_archive", "release_of"]

_MODULES: Final = Path("/lib/modules")
_VERSION: Final = 0x20E  # of a bzImage: offset of a text, from 0x200
_TEXT: Final = b"Linux version "
_CHUNK: Final = 4 << 20
_LONGEST: Final = 128


def release_of(kernel: Path) -> str:
    """Return the release of a kernel file, as `uname -r` would print it.

    Raises:
        KernelError: the file cannot be read, or does not say its release.
    """
    descriptor = open_file(kernel)
    try:
        found = _of_bzimage(descriptor) or _of_elf(descriptor)
    finally:
        os.close(descriptor)
    if not found:
        raise KernelError(
            f"{kernel.name} does not say its release", "give a bzImage or an uncompressed vmlinux"
        )
    return found


def _of_bzimage(descriptor: int) -> str:
    head = os.pread(descriptor, 0x210, 0)
    if head[0x202:0x206] != b"HdrS":
        return ""
    at = 0x200 + int.from_bytes(head[_VERSION : _VERSION + 2], "little")
    return _word(os.pread(descriptor, _LONGEST, at))


def _of_elf(descriptor: int) -> str:
    at = 0
    while chunk := os.pread(descriptor, _CHUNK, at):
        place = chunk.find(_TEXT)
        if place >= 0:
            return _word(os.pread(descriptor, _LONGEST, at + place + len(_TEXT)))
        at += max(len(chunk) - len(_TEXT), 1)
    return ""


def _word(data: bytes) -> str:
    return data.split(b"\0")[0].split(b" ")[0].decode("ascii", errors="replace")


def modules_archive(release: str, names: Sequence[str]) -> Path:
    """Return a cached archive of `/modules`, whose names begin with their place in the order.

    Args:
        release: the kernel's release; its modules are in `/lib/modules`.
        names: names of modules; those that are built in, or that this kernel has not, are left out.

    Raises:
        ModuleFileError: this host has no modules of that release, or one lacks.
        KernelCompressionError: a module cannot be unpacked.
    """
    files = module_files.in_order(_MODULES / release, names)

    def make(directory: Path) -> None:
        entries = [cpio.directory("modules")]
        for place, file in enumerate(files):
            content = decompress(file.read_bytes(), file.name)
            name = f"{place:03}-{file.name.split('.')[0]}"
            entries.append(cpio.file(f"modules/{name}", content))
        (directory / "modules.cpio").write_bytes(cpio.archive(*entries))

    inputs = [item for file in files for item in (file.name, file)]
    return cache.entry("guest-modules", cache.key(*inputs), make) / "modules.cpio"
