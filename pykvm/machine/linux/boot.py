"""Kernels of any kind, and the information that every boot protocol gives them."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from pykvm.errors import PykvmError
from pykvm.kvm import Vcpu
from pykvm.memory.guest_memory import GuestMemory

__all__ = [
    "BootInfo",
    "Kernel",
    "KernelError",
    "MemoryKind",
    "MemoryRange",
    "open_file",
    "read_into",
]


class KernelError(PykvmError):
    """A file that is no kernel, or not a whole one, or does not fit into the guest."""


def open_file(path: Path) -> int:
    """Return a descriptor of a regular file that a machine is made of.

    Raises:
        KernelError: there is no such file, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(f"{path} cannot be read: {error.strerror}", "check its name") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise KernelError(f"{path} is no regular file", "name a file")
    return descriptor


def read_into(descriptor: int, offset: int, view: memoryview, name: str) -> None:
    """Fill a view of the guest's memory from a file, without a copy in this process.

    Args:
        descriptor: the file.
        offset: first byte to read.
        view: where the bytes go.
        name: name of the file, for messages.

    Raises:
        KernelError: the file ends before.
    """
    done = 0
    while done < len(view):
        n = os.preadv(descriptor, [view[done:]], offset + done)
        if not n:
            raise KernelError(f"{name} has become shorter", "copy it again")
        done += n


class MemoryKind(IntEnum):
    """Types of memory, as in E820 (ACPI specification 6.5, table 15.4)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


@dataclass(frozen=True)
class MemoryRange:
    """A range of guest physical memory.

    Attributes:
        gpa: first address.
        size: bytes.
        kind: its type.
    """

    gpa: int
    size: int
    kind: MemoryKind


@dataclass(frozen=True)
class BootInfo:
    """Information for a kernel.

    Attributes:
        ranges: the guest's memory, in order.
        command_line: GPA of the command line, which ends in a zero.
        rsdp: GPA of ACPI's root pointer.
        initrd: GPA and size of the initial RAM disk, if there is one.
    """

    ranges: Sequence[MemoryRange]
    command_line: int
    rsdp: int
    initrd: tuple[int, int] | None = None


class Kernel(Protocol):
    """A kernel in a file, to be booted by one protocol.

    Attributes:
        end: physical address behind all that it needs before it manages memory itself.
        longest_line: most bytes of its command line, without the zero.
    """

    @property
    def end(self) -> int: ...

    @property
    def longest_line(self) -> int: ...

    def load(self, memory: GuestMemory) -> None:
        """Copy it into memory that is zero.

        Raises:
            KernelError: it does not fit, or the file has become shorter.
        """

    def start(self, vcpu: Vcpu, memory: GuestMemory, info: BootInfo) -> None:
        """Write what it is told into memory, and put a vCPU to its entry point."""
