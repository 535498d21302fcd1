"""Interpreter of classic BPF as seccomp runs it.

Source: Linux Documentation/networking/filter.rst; kernel/seccomp.c (seccomp_check_filter): loads
are of aligned words of struct seccomp_data, jumps lead forward and stay within the program.
"""

import struct
from collections.abc import Sequence
from typing import Final

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
EPERM: Final = 0x00050001
ENOSYS: Final = 0x00050026
X86_64: Final = 0xC000003E
I386: Final = 0x40000003


def answer(
    program: bytes, number: int, arguments: Sequence[int] = (), architecture: int = X86_64
) -> int:
    """Return what a filter says to a system call; AssertionError for a program that is none."""
    given = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iI7Q", number, architecture, 0, *given)
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator = at = 0
    constant: int
    while True:
        assert at < len(code), "it runs over its end"
        operation, if_true, if_false, constant = code[at]
        at += 1
        match operation:
            case 0x20:
                assert constant % 4 == 0, constant
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:
                accumulator &= constant
            case 0x15:
                at += if_true if accumulator == constant else if_false
            case 0x35:
                at += if_true if accumulator >= constant else if_false
            case 0x06:
                return constant
            case _:
                raise AssertionError(f"operation {operation:#x}")
