"""Inputs as text files, and their bytes as numbers for a harness in Python."""

from collections.abc import Iterable
from pathlib import Path

__all__ = ["Input", "read_corpus", "write_corpus"]


def read_corpus(path: Path) -> list[bytes]:
    """Read inputs in hexadecimal, one a line; text after a # is a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [bytes.fromhex(line) for line in lines if line]


def write_corpus(path: Path, inputs: Iterable[bytes], remark: str) -> None:
    """Write a line with a remark and then the inputs, shortest first."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    path.write_text("\n".join([f"# {remark}", *(data.hex() for data in ordered)]) + "\n")


class Input:
    """The bytes of an input, taken one after the other; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        data = self._data[self._at : self._at + size]
        self._at += size
        return data.ljust(size, b"\0")

    def number(self, size: int = 1) -> int:
        """Return a number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(max(len(self._data) - self._at, 0))
