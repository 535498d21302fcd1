"""Arguments of packets: numbers, bytes and threads, all in hexadecimal digits."""

import re
from typing import Final

__all__ = ["ALL_THREADS", "ArgumentError", "number", "numbers", "octets", "thread"]

ALL_THREADS: Final = -1

_HEX: Final = re.compile(r"[0-9a-fA-F]{1,16}")
_PAIRS: Final = re.compile(r"([0-9a-fA-F]{2})*")


class ArgumentError(Exception):
    """Arguments that make no sense; the client gets an error in answer."""


def number(text: str) -> int:
    """Return a number below 2^64."""
    if not _HEX.fullmatch(text):
        raise ArgumentError
    return int(text, 16)


def numbers(text: str, count: int) -> list[int]:
    """Return numbers that commas separate."""
    parts = text.split(",")
    if len(parts) != count:
        raise ArgumentError
    return [number(part) for part in parts]


def octets(digits: str) -> bytes:
    """Return the bytes that pairs of digits stand for."""
    if not _PAIRS.fullmatch(digits):
        raise ArgumentError
    return bytes.fromhex(digits)


def thread(text: str) -> int:
    """Return a thread's number; `ALL_THREADS`, or 0 for any of them."""
    return ALL_THREADS if text == "-1" else number(text)
