"""Model-specific registers: lists of numbers, reading, writing, and the MSR filter.

Source: Documentation/virt/kvm/api.rst 4.3, 4.18, 4.19 and 4.126 (KVM_X86_SET_MSR_FILTER).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pykvm.kvm.errors import IoctlError, MsrError, MsrFilterError
from pykvm.kvm.native import Struct, ffi, lib

__all__ = [
    "MsrRange",
    "pack_msr_filter",
    "read_msr_list",
    "read_msrs",
    "read_readable_msrs",
    "write_msrs",
]

MOST_IN_A_CALL: Final = 255
"""MSRs of one KVM_GET_MSRS or KVM_SET_MSRS: MAX_IO_MSRS in Linux arch/x86/kvm/x86.c, less one."""

MOST_IN_A_RANGE: Final = 0x600 * 8
"""MSRs of one range of a filter: KVM_MSR_FILTER_MAX_BITMAP_SIZE (Linux asm/kvm_host.h) in bits."""

Call = Callable[[Struct], int]
"""Makes KVM_GET_MSRS or KVM_SET_MSRS with a struct kvm_msrs; returns how many it got through."""


@dataclass(frozen=True, slots=True)
class MsrRange:
    """Access to MSRs of consecutive numbers.

    Attributes:
        base: the first number.
        allowed: a flag for each MSR, True where the access goes on as if there were no filter.
            More than 12288 flags count as several ranges.
        read: whether the range is about reads.
        write: whether it is about writes.
    """

    base: int
    allowed: Sequence[bool]
    read: bool = True
    write: bool = True


def read_msr_list(call: Callable[[Struct], int]) -> list[int]:
    """Make a call that fills a struct kvm_msr_list; return the MSR numbers."""
    size = 0
    while True:
        table = ffi.new("struct kvm_msr_list *", {"nmsrs": size, "indices": size})
        try:
            call(table)
        except IoctlError as error:
            # E2BIG: the kernel has written the number that it wants to return.
            if error.errno != errno.E2BIG or table.nmsrs <= size:
                raise
            size = table.nmsrs
            continue
        return list(table.indices[0 : table.nmsrs])


def read_msrs(
    call: Call, indices: Iterable[int], known: Callable[[], Iterable[int]]
) -> dict[int, int]:
    """Make KVM_GET_MSRS as often as it takes; return number to value.

    Args:
        call: makes one.
        indices: the numbers.
        known: returns the MSRs that this KVM lists; asked for the message alone.

    Raises:
        MsrError: KVM refused one; it names the first.
    """
    values: dict[int, int] = {}
    for part in _parts([(index, 0) for index in indices]):
        table = _pack(part)
        done = call(table)
        values.update((table.entries[i].index, table.entries[i].data) for i in range(done))
        if done < len(part):
            index = part[done][0]
            raise MsrError(
                f"kvm does not read msr {index:#x}",
                "give the vcpu the feature it belongs to, with set_cpuid2()"
                if index in known()
                else "use a number that get_msr_index_list() or get_msr_feature_index_list() has",
                index,
            )
    return values


def read_readable_msrs(call: Call, indices: Iterable[int]) -> dict[int, int]:
    """Make KVM_GET_MSRS as often as it takes; return number to value of those that KVM reads."""
    values: dict[int, int] = {}
    left = list(indices)
    while left:
        part = left[:MOST_IN_A_CALL]
        table = _pack([(index, 0) for index in part])
        done = call(table)
        values.update((table.entries[i].index, table.entries[i].data) for i in range(done))
        left = left[done if done == len(part) else done + 1 :]
    return values


def write_msrs(call: Call, read: Call, values: Mapping[int, int]) -> None:
    """Make KVM_SET_MSRS as often as it takes, in the mapping's order.

    Args:
        call: makes one.
        read: makes a KVM_GET_MSRS, asked for the message alone.
        values: number to value.

    Raises:
        MsrError: KVM refused one; it names the first. Those before it are set.
    """
    for part in _parts(list(values.items())):
        done = call(_pack(part))
        if done < len(part):
            index, value = part[done]
            raise MsrError(
                f"kvm does not write {value:#x} to msr {index:#x}",
                _why_not_written(read, index, value),
                index,
            )


def _why_not_written(read: Call, index: int, value: int) -> str:
    table = _pack([(index, 0)])
    if read(table) != 1:
        return "leave it out, or give the vcpu the feature it belongs to with set_cpuid2()"
    present = table.entries[0].data
    if present == value:
        return "leave it out: it holds that value, and is read-only"
    return f"use bits that the vcpu's cpuid allows: it holds {present:#x}"


def _parts(items: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    for first in range(0, len(items), MOST_IN_A_CALL):
        yield items[first : first + MOST_IN_A_CALL]


def _pack(items: Sequence[tuple[int, int]]) -> Struct:
    table = ffi.new("struct kvm_msrs *", {"nmsrs": len(items), "entries": len(items)})
    for slot, (index, value) in enumerate(items):
        table.entries[slot].index = index
        table.entries[slot].data = value
    return table


def pack_msr_filter(ranges: Sequence[MsrRange], default_allow: bool) -> tuple[Struct, list[Struct]]:
    """Return a struct kvm_msr_filter, and the bitmaps that have to outlive it.

    Raises:
        MsrFilterError: there are too many ranges, or one is empty or ends too high.
    """
    result = ffi.new("struct kvm_msr_filter *")
    result.flags = (
        lib.KVM_MSR_FILTER_DEFAULT_ALLOW if default_allow else lib.KVM_MSR_FILTER_DEFAULT_DENY
    )
    pieces = [piece for each in ranges for piece in _pieces(each)]
    if len(pieces) > len(result.ranges):
        raise MsrFilterError(
            f"{len(pieces)} ranges in an msr filter",
            f"join them to at most {len(result.ranges)}, of up to {MOST_IN_A_RANGE} msrs each",
        )
    bitmaps: list[Struct] = []
    for slot, each in enumerate(pieces):
        bitmap = ffi.new("__u8[]", (len(each.allowed) + 7) // 8)
        for bit, allowed in enumerate(each.allowed):
            if allowed:
                bitmap[bit // 8] |= 1 << bit % 8
        bitmaps.append(bitmap)
        target = result.ranges[slot]
        target.flags = (lib.KVM_MSR_FILTER_READ if each.read else 0) | (
            lib.KVM_MSR_FILTER_WRITE if each.write else 0
        )
        target.base = each.base
        target.nmsrs = len(each.allowed)
        target.bitmap = bitmap
    return result, bitmaps


def _pieces(whole: MsrRange) -> Iterator[MsrRange]:
    """The ranges that KVM takes in its place."""
    if not whole.allowed or not (whole.read or whole.write):
        raise MsrFilterError(f"the msr range at {whole.base:#x} is empty", "leave it out")
    if whole.base < 0 or whole.base + len(whole.allowed) > 1 << 32:
        raise MsrFilterError(
            f"the msr range of {len(whole.allowed)} from {whole.base:#x} on",
            "stay between 0 and 0xffffffff",
        )
    for first in range(0, len(whole.allowed), MOST_IN_A_RANGE):
        flags = whole.allowed[first : first + MOST_IN_A_RANGE]
        yield MsrRange(whole.base + first, flags, whole.read, whole.write)
