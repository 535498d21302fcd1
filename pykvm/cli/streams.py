"""Standard streams of a command, which may be closed, full, or unable to encode a file name."""

import contextlib
import io
import os
import sys
from typing import Any

__all__ = ["prepare", "settle"]


class _Output(io.FileIO):
    """Standard output whose OSErrors have a file name, like those of other files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


def prepare() -> None:
    """Open the standard streams that are closed, and let the output encode every file name.

    The replacement of a closed standard output refuses every write, as the closed one would. A
    stream that was replaced, for example by a test, is not changed.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _output(sys.__stdout__)


def settle() -> None:
    """Flush the output streams; drop data that cannot be written.

    The interpreter would otherwise try again at its end, and print an error.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # not a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _output(like: Any) -> io.TextIOWrapper:
    raw = _Output(1, "w", closefd=False)
    unbuffered = like is not None and like.write_through  # python -u
    encoding = like.encoding if like is not None else "utf-8"
    unicode = encoding.lower().replace("-", "") == "utf8"
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        # A name that is not valid UTF-8 is written as its bytes.
        errors="surrogateescape" if unicode else "backslashreplace",
        line_buffering=like is not None and like.line_buffering,
        write_through=unbuffered,
    )
