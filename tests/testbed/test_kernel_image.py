"""Extraction of the kernel from a bzImage, with small ones made here."""

import gzip
import lzma
import struct

import pytest

from pykvm.machine.linux.compression import KernelCompressionError
from pykvm.testbed import kernel_image

pytestmark = pytest.mark.unit

_TEXT = b"kernel text" * 100
_BASE = 0x100_0000
_ENTRY = 0x100_0850


def _elf() -> bytes:
    text_at = 0x1000
    headers = struct.pack("<IIQQQQQQ", 1, 5, text_at, 0, _BASE, len(_TEXT), 0x4000, 0x1000)
    headers += struct.pack("<IIQQQQQQ", 1, 6, text_at, 0, _BASE + 0x5000, 16, 0x9000, 0x1000)
    headers += struct.pack("<IIQQQQQQ", 4, 4, 0x3000, 0, 0, 16, 16, 4)
    image = bytearray(0x4000)
    image[:4] = b"\x7fELF"
    struct.pack_into("<QQ", image, 24, _ENTRY, 64)
    struct.pack_into("<H", image, 56, 3)
    image[64 : 64 + len(headers)] = headers
    image[text_at : text_at + len(_TEXT)] = _TEXT
    return bytes(image)


def _bzimage(payload: bytes) -> bytes:
    setup = bytearray(1024)
    setup[0x1F1] = 1  # one sector besides the boot sector
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"trailer"


def test_segments_lie_where_the_headers_say() -> None:
    for payload in (gzip.compress(_elf()), lzma.compress(_elf()) + bytes(4)):
        flat = kernel_image.flatten(_bzimage(payload))
        assert flat.address == _BASE
        assert flat.entry == _ENTRY
        assert flat.data[: len(_TEXT)] == _TEXT
        assert flat.data[0x5000:0x5010] == _TEXT[:16]
        assert flat.memory == 0x5000 + 0x9000


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(kernel_image.KernelImageError, match="no bzImage"):
        kernel_image.flatten(bytes(4096))
    with pytest.raises(KernelCompressionError, match="packed with something unknown"):
        kernel_image.flatten(_bzimage(b"abcdefgh"))
    with pytest.raises(kernel_image.KernelImageError, match="no ELF"):
        kernel_image.flatten(_bzimage(gzip.compress(b"text")))
