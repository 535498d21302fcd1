"""Read a file, a pipe or standard input once, and unpack it."""

from __future__ import annotations

import gzip
import io
import os
import shlex
import stat
import sys
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import BinaryIO, Final

from pykvm.sizes import MIB
from pykvm.switch.capture.errors import (
    CompressionError,
    TooLargeCaptureError,
    UnreadableCaptureError,
)

__all__ = ["Source", "displayed", "read_source"]

LIMIT: Final = 64 * MIB
"""Bytes of a capture, unpacked; a guest of `pykvm demo` has room for 16 MiB of frames."""

_GZIP: Final = b"\x1f\x8b"

# First bytes, and the command that unpacks to standard output.
_OTHER_COMPRESSIONS: Final = (
    (b"BZh", "bzip2", "bzcat"),
    (b"\xfd7zXZ\0", "xz", "xzcat"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstdcat"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4cat"),
    (b"PK\x03\x04", "zip", "unzip -p"),
)


@dataclass(frozen=True)
class Source:
    """One capture's bytes.

    name: for messages. operand: the file as commands that are suggested take it, quoted for the
    shell. data: all of it, unpacked.
    """

    name: str
    operand: str
    data: bytes


def displayed(path: str) -> str:
    """Return `path` in one printable line."""
    return path if path.isprintable() else ascii(path)


def read_source(path: str, limit: int = LIMIT) -> Source:
    """Read `path`, or standard input for ``-``, to its end, at most `limit` bytes of capture.

    Raises UnreadableCaptureError, CompressionError, TooLargeCaptureError.
    """
    name = "standard input" if path == "-" else displayed(path)
    try:
        with _open(path) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            operand = shlex.quote(path) if stat.S_ISREG(mode) and path != "-" else "FILE"
            if os.isatty(stream.fileno()):
                raise UnreadableCaptureError(
                    f"{name} is a terminal",
                    "give a file, or a pipe: `tcpdump -c 100 -w - | pykvm demo --capture -`",
                )
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableCaptureError(
            f"cannot read {name}: {reason}", "name a capture that you may read, or - for a pipe"
        ) from error
    if data.startswith(_GZIP):
        data = _unpacked(name, data, limit)
        operand = operand if operand == "FILE" else f"<(zcat {operand})"
    _refuse_large(name, operand, data, limit)
    for magic, compression, command in _OTHER_COMPRESSIONS:
        if data.startswith(magic):
            raise CompressionError(
                f"{name} is compressed with {compression}",
                f"unpack it on the way: `{command} {operand} | pykvm demo --capture -`",
            )
    return Source(name, operand, data)


def _open(path: str) -> BinaryIO | nullcontext[BinaryIO]:
    if path != "-":
        return open(path, "rb", opener=_opener)
    if sys.stdin is None:  # closed by whoever started us
        raise ValueError("it is closed")
    return nullcontext(sys.stdin.buffer)


def _opener(path: str, flags: int) -> int:
    # A session leader without a terminal must not get this one, and SIGHUP when it goes.
    return os.open(path, flags | os.O_NOCTTY)


def _unpacked(name: str, data: bytes, limit: int) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            return stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = "ends too early" if isinstance(error, EOFError) else str(error)
        raise CompressionError(
            f"{name} is damaged gzip data ({reason})", "copy or compress it again"
        ) from error


def _refuse_large(name: str, operand: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise TooLargeCaptureError(
            f"{name} holds more than {limit // MIB} MiB",
            f"take its first frames: `tcpdump -r {operand} -w first.pcap -c 10000`",
        )
