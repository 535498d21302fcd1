"""Compression of kernels and modules, recognised by the first bytes.

Source: Linux scripts/extract-vmlinux, lib/decompress.c.
"""

import bz2
import gzip
import lzma
import subprocess
import zlib
from typing import Final

from pykvm.errors import PykvmError
from pykvm.host.advice import install

__all__ = ["KernelCompressionError", "compression_of", "decompress", "decompress_payload"]

# First bytes, and the name.
_MAGICS: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO\0", "lzop"),
)

_PROGRAMS: Final = ("lz4", "zstd", "lzop")


class KernelCompressionError(PykvmError):
    """Data that cannot be unpacked."""


def compression_of(data: bytes) -> str | None:
    """Return the name of what packed the data, or None if that is unknown."""
    return next((name for magic, name in _MAGICS if data.startswith(magic)), None)


def decompress_payload(data: bytes, name: str) -> bytes:
    """Return the payload of a bzImage unpacked.

    Behind all but gzip's data lies the size of the result, for the kernel's own decompressor.

    Args:
        data: the payload.
        name: name of the file, for messages.

    Raises:
        KernelCompressionError: the compression is unknown, the data is broken, or the program that
            unpacks it is missing.
    """
    if compression_of(data) is None:
        raise KernelCompressionError(
            f"{name} is packed with something unknown ({data[:4].hex()})",
            "give an uncompressed kernel (vmlinux)",
        )
    # The others' unpackers end with their data; these programs refuse what follows it.
    return decompress(data[:-4] if compression_of(data) in _PROGRAMS else data, name)


def decompress(data: bytes, name: str) -> bytes:
    """Return data unpacked, or as it is if nothing has packed it.

    Raises:
        KernelCompressionError: the data is broken, or the program that unpacks it is missing.
    """
    kind = compression_of(data)
    try:
        match kind:
            case None:
                return data
            case "gzip":
                return gzip.decompress(data)
            case "bzip2":
                return _whole(bz2.BZ2Decompressor(), data, name)
            case "xz" | "lzma":
                return _whole(lzma.LZMADecompressor(), data, name)
            case program:
                return _filtered(program, data, name)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, gzip.BadGzipFile) as error:
        raise KernelCompressionError(
            f"{name} cannot be unpacked: {error}", "copy it again"
        ) from error


def _whole(
    decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: bytes, name: str
) -> bytes:
    content = decompressor.decompress(data)
    if not decompressor.eof:
        raise KernelCompressionError(f"{name} cannot be unpacked: it is truncated", "copy it again")
    return content


def _filtered(program: str, data: bytes, name: str) -> bytes:
    try:
        done = subprocess.run([program, "-d", "-c"], input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise KernelCompressionError(f"no program {program}", install([program])) from error
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise KernelCompressionError(f"{name} cannot be unpacked: {said}", "copy it again")
    return done.stdout
