"""Kernels in files: what kind they are, and how each is booted.

An ELF kernel is booted by PVH, and a Multiboot image by that protocol. A bzImage unpacks itself in
the guest, or its ELF kernel is unpacked here once and kept in the cache, which is faster from the
second boot on.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.closeable import Closeable
from pykvm.machine.linux.boot import Kernel, KernelError, open_file
from pykvm.machine.linux.bzimage import HEADER_SIZE, BzImage, is_bzimage
from pykvm.machine.linux.compression import compression_of, decompress_payload
from pykvm.machine.linux.elf_kernel import ElfKernel
from pykvm.machine.linux.multiboot import SEARCHED_SIZE, MultibootImage, is_multiboot

__all__ = ["KernelFile", "is_whole_system", "unpacked"]

# First bytes of what people give by mistake, and its name.
_OTHERS: Final = (
    (b"070701", "an initial RAM disk (cpio)"),
    (b"QFI\xfb", "a disk image (qcow2)"),
    (b"!<arch>\n", "a Debian package or an archive"),
    (b"#!", "a script"),
    (b"\xca\xfe\xba\xbe", "a program of macOS"),
)
_ARM64: Final = (0x38, b"ARM\x64")
_PE: Final = b"MZ"
_GIVE: Final = "give a vmlinuz (bzImage) or a vmlinux (ELF) for x86-64"


class KernelFile(Closeable):
    """An open file that holds a kernel.

    Attributes:
        kernel: the kernel, with the protocol by which it is booted.

    Args:
        path: the file.
        unpack: whether a bzImage is unpacked here, instead of in the guest.

    Raises:
        KernelError: it is no kernel for x86-64, or not a whole one.
        KernelCompressionError: it cannot be unpacked.
    """

    def __init__(self, path: Path, *, unpack: bool = False) -> None:
        with ExitStack() as stack:
            descriptor = open_file(path)
            stack.callback(os.close, descriptor)
            head = _head(descriptor, path)
            self.kernel: Kernel
            if is_bzimage(head) and unpack:
                descriptor = open_file(unpacked(path))
                stack.callback(os.close, descriptor)
                self.kernel = ElfKernel(descriptor, path.name)
            elif is_bzimage(head):
                self.kernel = BzImage(descriptor, path.name)
            elif is_multiboot(head):
                self.kernel = MultibootImage(descriptor, path.name)
            elif head.startswith(b"\x7fELF"):
                self.kernel = ElfKernel(descriptor, path.name)
            else:
                raise KernelError(f"{path.name} is {_kind(head)}, not a kernel", _GIVE)
            self._files = stack.pop_all()

    def close(self) -> None:
        """Close the file. Harmless twice."""
        self._files.close()


def is_whole_system(path: Path) -> bool:
    """Return whether a file is a Multiboot image, which needs no initial RAM disk.

    Raises:
        KernelError: the file cannot be read.
    """
    descriptor = open_file(path)
    try:
        head = _head(descriptor, path)
    finally:
        os.close(descriptor)
    return not is_bzimage(head) and is_multiboot(head)


def unpacked(path: Path) -> Path:
    """Return the ELF kernel of a bzImage, from the cache or unpacked into it.

    Raises:
        KernelError: it is no bzImage, or there is no ELF kernel in it.
        KernelCompressionError: it cannot be unpacked.
    """

    def make(directory: Path) -> None:
        descriptor = open_file(path)
        try:
            kernel = decompress_payload(BzImage(descriptor, path.name).payload(), path.name)
        finally:
            os.close(descriptor)
        if not kernel.startswith(b"\x7fELF"):
            raise KernelError(f"{path.name} holds no ELF kernel", "boot it without unpacking it")
        (directory / "vmlinux").write_bytes(kernel)

    return cache.entry("vmlinux", cache.key("from bzImage", path), make) / "vmlinux"


def _head(descriptor: int, path: Path) -> bytes:
    head = os.pread(descriptor, max(HEADER_SIZE, SEARCHED_SIZE), 0)
    if not head:
        raise KernelError(f"{path.name} is empty", _GIVE)
    return head


def _kind(head: bytes) -> str:
    if packed := compression_of(head):
        return f"packed with {packed}"
    offset, magic = _ARM64
    if head[offset : offset + len(magic)] == magic:
        return "a kernel for 64-bit Arm"
    if head.startswith(_PE):
        return "a program for EFI or Windows"
    return next((name for magic, name in _OTHERS if head.startswith(magic)), "of an unknown kind")
