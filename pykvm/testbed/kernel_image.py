"""The distribution's kernel for the emulated host, unpacked, and its uncompressed image.

The package is fetched and unpacked into the cache; it is not installed on this machine.
"""

import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host import debian_packages
from pykvm.host.advice import install
from pykvm.kernel.series import HostKernel
from pykvm.machine.linux.compression import decompress_payload
from pykvm.testbed import rootfs

__all__ = ["FlatKernel", "KernelImageError", "flatten", "unpacked"]

# Offsets in a bzImage (Linux Documentation/x86/boot.rst).
_SETUP_SECTORS = 0x1F1
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C

_PT_LOAD = 1


class KernelImageError(PykvmError):
    """The kernel for the emulated host cannot be found or read."""


@dataclass(frozen=True)
class FlatKernel:
    """A kernel as it is laid out in memory.

    Attributes:
        address: guest physical address of the first byte.
        data: the loaded bytes.
        memory: bytes that the kernel occupies from `address` on, including its bss.
        entry: address of the entry point in 64-bit mode (startup_64).
    """

    address: int
    data: bytes
    memory: int
    entry: int


def unpacked(kernel: HostKernel) -> Path:
    """Return the directory of the unpacked image package of `kernel`.

    It holds `boot/` and `lib/modules/`. The modules are uncompressed, which takes a second here
    and would take many on the emulated host.

    Raises:
        PackageError: the image package cannot be fetched.
        KernelImageError: xz is missing, or fails.
        RootfsError: see `pykvm.testbed.rootfs.run_depmod`.
    """

    def build(directory: Path) -> None:
        package = _image_package(kernel)
        (archive,) = debian_packages.fetch([package])
        # The modules are in /lib, or in /usr/lib since Debian 13. The link makes both the same.
        (directory / "usr/lib").mkdir(parents=True)
        (directory / "lib").symlink_to("usr/lib")
        debian_packages.unpack(archive, directory)
        _uncompress_modules(directory)
        rootfs.run_depmod(directory, kernel.release)

    key = cache.key(kernel.release, kernel.package, "plain modules, one lib")
    return cache.entry("testbed-kernel", key, build)


def _image_package(kernel: HostKernel) -> debian_packages.Package:
    name = f"linux-image-{kernel.release}"
    try:
        return debian_packages.exact(name, kernel.package)
    except debian_packages.PackageError as error:
        try:  # the same kernel; its signed package appears a little later
            return debian_packages.exact(f"{name}-unsigned", kernel.package)
        except debian_packages.PackageError:
            raise error from None


def _uncompress_modules(directory: Path) -> None:
    modules = [str(path) for path in directory.glob("lib/modules/**/*.ko.xz")]
    if not modules:
        return
    try:
        done = subprocess.run(
            ["xz", "-d", "-T0", *modules],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise KernelImageError("no program xz", install(["xz-utils"])) from error
    if done.returncode:
        raise KernelImageError(f"xz cannot unpack the kernel's modules ({done.stderr.strip()})")


def flatten(bzimage: bytes) -> FlatKernel:
    """Unpack the ELF kernel inside a bzImage and lay its segments out as in memory.

    Args:
        bzimage: content of the kernel's file, /boot/vmlinuz-RELEASE.

    Raises:
        KernelImageError: it is not a bzImage, or holds no ELF kernel.
        KernelCompressionError: it cannot be unpacked.
    """
    elf = _decompressed(bzimage)
    if elf[:4] != b"\x7fELF":
        raise KernelImageError("the kernel image holds no ELF kernel", "use a distribution kernel")
    entry, header_offset = struct.unpack_from("<QQ", elf, 24)
    (count,) = struct.unpack_from("<H", elf, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", elf, header_offset + 56 * i) for i in range(count)]
    loads = [header for header in headers if header[0] == _PT_LOAD]
    address = min(header[4] for header in loads)
    image = bytearray(max(header[4] + header[5] for header in loads) - address)
    for _, _, offset, _, physical, size, _, _ in loads:
        image[physical - address : physical - address + size] = elf[offset : offset + size]
    memory = max(header[4] + header[6] for header in loads) - address
    return FlatKernel(address, bytes(image), memory, entry)


def _decompressed(bzimage: bytes) -> bytes:
    if bzimage[0x202:0x206] != b"HdrS":
        raise KernelImageError("the kernel is no bzImage", "use a distribution kernel")
    setup = (bzimage[_SETUP_SECTORS] + 1) * 512
    (offset,) = struct.unpack_from("<I", bzimage, _PAYLOAD_OFFSET)
    (length,) = struct.unpack_from("<I", bzimage, _PAYLOAD_LENGTH)
    payload = bzimage[setup + offset : setup + offset + length]
    return decompress_payload(payload, "the kernel")
