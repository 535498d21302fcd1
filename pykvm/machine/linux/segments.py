"""Parts of a kernel's file, and the guest memory into which each is copied."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import KernelError, read_into
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import AddressError

__all__ = ["Segment", "end_of", "load_segments", "read_part", "require_entry", "require_whole"]


@dataclass(frozen=True)
class Segment:
    """A part of a file, followed by zeros in memory.

    Attributes:
        offset: its first byte in the file.
        physical: guest physical address of its first byte.
        file_size: bytes in the file.
        memory_size: bytes in memory.
    """

    offset: int
    physical: int
    file_size: int
    memory_size: int


def read_part(descriptor: int, offset: int, size: int, name: str) -> bytes:
    """Return bytes of a file.

    Raises:
        KernelError: the file, whose name is for the message, ends before.
    """
    if offset + size > os.fstat(descriptor).st_size:
        raise KernelError(f"{name} is truncated", "copy it again")
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise KernelError(f"{name} has become shorter", "copy it again")
    return data


def require_whole(segments: Iterable[Segment], descriptor: int, name: str) -> None:
    """Check that the file holds what the segments need of it.

    Raises:
        KernelError: it does not, or a segment is larger in the file than in memory.
    """
    size = os.fstat(descriptor).st_size
    for one in segments:
        if one.file_size > one.memory_size or one.offset + one.file_size > size:
            raise KernelError(f"{name} is truncated", "copy it again")


def require_entry(entry: int, segments: Iterable[Segment], name: str) -> None:
    """Check that an entry point lies in a segment.

    Raises:
        KernelError: it does not.
    """
    if not any(0 <= entry - one.physical < one.memory_size for one in segments):
        raise KernelError(f"{name} begins at {entry:#x}, where nothing of it is", "link it again")


def end_of(segments: Iterable[Segment]) -> int:
    """Return the physical address behind the last byte of all segments."""
    return max(one.physical + one.memory_size for one in segments)


def load_segments(
    segments: Iterable[Segment], descriptor: int, memory: GuestMemory, name: str
) -> None:
    """Copy segments into memory that is zero.

    Raises:
        KernelError: there is no memory for one of them, the machine's own tables are there, or the
            file has become shorter.
    """
    for one in segments:
        if one.physical < layout.FIRST_MEGABYTE:
            raise KernelError(
                f"{name} needs memory at {one.physical:#x}, where the machine's tables are",
                f"link it at {layout.FIRST_MEGABYTE:#x} or above",
            )
        try:
            memory.view(one.physical, one.memory_size)
            view = memory.view(one.physical, one.file_size)
        except AddressError as error:
            end = one.physical + one.memory_size
            raise KernelError(
                f"{name} needs memory at {one.physical:#x} to {end:#x}, which the guest has not",
                f"give the guest {(end >> 20) + 64} MiB or more",
            ) from error
        read_into(descriptor, one.offset, view, name)
