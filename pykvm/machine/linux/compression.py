"""What kernels are compressed with, recognised by its first bytes.

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

__all__ = ["CompressionError", "compression_of", "decompress"]

# First bytes, and the name. Those with a program are unpacked by it, the others by Python.
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


class CompressionError(PykvmError):
    """Data that cannot be unpacked."""


def compression_of(data: bytes) -> str | None:
    """Return the name of what packed the data, or None if that is unknown."""
    return next((name for magic, name in _MAGICS if data.startswith(magic)), None)


def decompress(data: bytes, name: str) -> bytes:
    """Return the data unpacked. What lies behind the packed data is ignored.

    Args:
        data: packed data of any kind that kernels are compressed with.
        name: name of the file, for messages.

    Raises:
        CompressionError: the compression is unknown, the data is broken, or the program that
            unpacks it is missing.
    """
    kind = compression_of(data)
    try:
        match kind:
            case None:
                raise CompressionError(
                    f"{name} is packed with something unknown ({data[:4].hex()})",
                    "give an uncompressed kernel (vmlinux)",
                )
            case "gzip":
                return zlib.decompressobj(wbits=31).decompress(data)
            case "bzip2":
                return bz2.BZ2Decompressor().decompress(data)
            case "xz" | "lzma":
                return lzma.LZMADecompressor().decompress(data)
            case program:
                return _filtered(program, data, name)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, gzip.BadGzipFile) as error:
        raise CompressionError(f"{name} cannot be unpacked: {error}", "copy it again") from error


def _filtered(program: str, data: bytes, name: str) -> bytes:
    try:
        done = subprocess.run([program, "-d", "-c"], input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise CompressionError(f"no program {program}", install([program])) from error
    if done.returncode and not done.stdout:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise CompressionError(f"{name} cannot be unpacked: {said}", "copy it again")
    return done.stdout
