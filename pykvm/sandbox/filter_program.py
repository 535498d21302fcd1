"""Assembler for filters of system calls (classic BPF), as far as a list of rules needs it.

Source: Linux Documentation/userspace-api/seccomp_filter.rst, Documentation/networking/filter.rst.

A filter is a chain of blocks, one for each system call: compare the number, else go on behind the
block. All jumps lead forward within a block, so their eight bits suffice. Since Linux 5.11 calls
that are allowed with any arguments do not run the filter at all (SECCOMP_CACHE), so what counts is
the order of those that depend on their arguments: they come first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pykvm.sandbox._sandbox import lib

__all__ = ["Instruction", "Match", "assemble", "packed"]

_LOAD: Final[int] = lib.BPF_LD | lib.BPF_W | lib.BPF_ABS
_AND: Final[int] = lib.BPF_ALU | lib.BPF_AND | lib.BPF_K
_JUMP_EQUAL: Final[int] = lib.BPF_JMP | lib.BPF_JEQ | lib.BPF_K
_JUMP_FROM: Final[int] = lib.BPF_JMP | lib.BPF_JGE | lib.BPF_K
_RETURN: Final[int] = lib.BPF_RET | lib.BPF_K

_LOW: Final = 0xFFFF_FFFF
_FURTHEST: Final = 255


class Instruction(NamedTuple):
    """One struct sock_filter."""

    code: int
    if_true: int
    if_false: int
    constant: int


@dataclass(frozen=True)
class Match:
    """A condition on an argument of a system call: its bits in `mask` are those of `value`.

    Attributes:
        argument: its number, from 0 on.
        value: the bits that are wanted.
        mask: the bits that count. The upper half of an int is not looked at by the kernel either.
    """

    argument: int
    value: int
    mask: int = _LOW

    def __post_init__(self) -> None:
        if (
            not 0 <= self.argument < 6
            or self.value & ~self.mask
            or self.mask >> 64
            or not self.mask
        ):
            raise ValueError(f"{self} cannot hold")

    def loads(self) -> list[tuple[int, int, int]]:
        """Return offset in struct seccomp_data, mask and value of each half that counts."""
        at = lib.SECCOMP_DATA_ARGS + 8 * self.argument  # little endian
        halves = ((at + 4 * half, self.mask >> 32 * half & _LOW, half) for half in (0, 1))
        return [
            (offset, mask, self.value >> 32 * half & _LOW) for offset, mask, half in halves if mask
        ]


def _return(action: int) -> Instruction:
    return Instruction(_RETURN, 0, 0, action)


def _rule(matches: Sequence[Match]) -> list[Instruction]:
    """Return code that allows the call if all conditions hold, and else falls through."""
    parts: list[list[Instruction]] = []
    for match in matches:
        for offset, mask, value in match.loads():
            part = [Instruction(_LOAD, 0, 0, offset)]
            if mask != _LOW:
                part.append(Instruction(_AND, 0, 0, mask))
            parts.append([*part, Instruction(_JUMP_EQUAL, 0, 0, value)])
    code: list[Instruction] = [_return(lib.SECCOMP_RET_ALLOW)]
    for part in reversed(parts):
        # Not equal: jump over the rest of the rule.
        code = [*part[:-1], part[-1]._replace(if_false=len(code)), *code]
    return code


def _block(number: int, body: Sequence[Instruction]) -> list[Instruction]:
    """Return code that runs `body`, which does not fall through, for one system call."""
    if len(body) > _FURTHEST:
        raise ValueError(f"rules for system call {number} of {len(body)} instructions")
    return [Instruction(_JUMP_EQUAL, 0, len(body), number), *body]


def assemble(
    checked: Mapping[int, Sequence[Sequence[Match]]],
    actions: Mapping[int, int],
    default: int,
) -> list[Instruction]:
    """Return the filter for this processor's own system calls.

    Those of another ABI (i386, x32) end the process.

    Args:
        checked: for a call's number, lists of conditions. It is allowed if all of one list hold,
            else `default` answers. The first calls are the fastest.
        actions: answers to calls whatever their arguments are.
        default: the answer to all others.

    Raises:
        ValueError: the filter is longer than the kernel takes, or a call is in both mappings.
    """
    if both := checked.keys() & actions.keys():
        raise ValueError(f"system calls {sorted(both)} have two answers")
    kill = _return(lib.SECCOMP_RET_KILL_PROCESS)
    number = Instruction(_LOAD, 0, 0, lib.SECCOMP_DATA_NUMBER)
    code = [
        Instruction(_LOAD, 0, 0, lib.SECCOMP_DATA_ARCH),
        Instruction(_JUMP_EQUAL, 1, 0, lib.THIS_ARCH),
        kill,
        number,
    ]
    for call, rules in checked.items():
        body = [one for rule in rules for one in _rule(rule)]
        code += _block(call, [*body, _return(default)])
    if lib.X32_BIT:
        code += [Instruction(_JUMP_FROM, 0, 1, lib.X32_BIT), kill]
    for call, action in actions.items():
        code += _block(call, [_return(action)])
    code.append(_return(default))
    if len(code) > lib.BPF_MAXINSNS:
        raise ValueError(f"a filter of {len(code)} instructions: linux takes {lib.BPF_MAXINSNS}")
    return code


def packed(code: Sequence[Instruction]) -> bytes:
    """Return the filter as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
