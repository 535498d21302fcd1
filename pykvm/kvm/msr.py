"""Model-specific registers: lists of numbers, reading, writing, and the MSR filter.

Source: Documentation/virt/kvm/api.rst 4.3, 4.18, 4.19 and 4.126 (KVM_X86_SET_MSR_FILTER).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pykvm.kvm._kvm import ffi, lib
from pykvm.kvm.errors import IoctlError, MsrError
from pykvm.kvm.handle import Struct

__all__ = ["MsrRange", "pack_msr_filter", "read_msr_list", "read_msrs", "write_msrs"]


@dataclass(frozen=True, slots=True)
class MsrRange:
    """Access to the MSRs from `base` on, one flag each.

    allowed: a flag per MSR, True where the access goes on as if there were no filter. read,
    write: which accesses the range is about. Shape: 1 to 12288 flags.
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


def read_msrs(call: Callable[[Struct], int], indices: Iterable[int]) -> dict[int, int]:
    """KVM_GET_MSRS: number to value. Raises MsrError at the first one that KVM refuses."""
    indices = list(indices)
    table = _pack((index, 0) for index in indices)
    done = call(table)
    if done < len(indices):
        raise MsrError(
            f"kvm does not read msr {indices[done]:#x}: use a number of msr_index_list()",
            indices[done],
        )
    return {table.entries[i].index: table.entries[i].data for i in range(done)}


def write_msrs(call: Callable[[Struct], int], values: Mapping[int, int]) -> None:
    """KVM_SET_MSRS, in the mapping's order; those before a refused one are set."""
    items = list(values.items())
    done = call(_pack(items))
    if done < len(items):
        index, value = items[done]
        raise MsrError(
            f"kvm does not write {value:#x} to msr {index:#x}: "
            "use a number of msr_index_list(), and a value its bits allow",
            index,
        )


def _pack(items: Iterable[tuple[int, int]]) -> Struct:
    items = list(items)
    table = ffi.new("struct kvm_msrs *", {"nmsrs": len(items), "entries": len(items)})
    for slot, (index, value) in enumerate(items):
        table.entries[slot].index = index
        table.entries[slot].data = value
    return table


def pack_msr_filter(ranges: Sequence[MsrRange], default_allow: bool) -> tuple[Struct, list[Struct]]:
    """A struct kvm_msr_filter, and the bitmaps that have to outlive it."""
    result = ffi.new("struct kvm_msr_filter *")
    limit = len(result.ranges)
    if len(ranges) > limit:
        raise MsrError(
            f"{len(ranges)} msr ranges: join them to at most {limit}", ranges[limit].base
        )
    result.flags = (
        lib.KVM_MSR_FILTER_DEFAULT_ALLOW if default_allow else lib.KVM_MSR_FILTER_DEFAULT_DENY
    )
    bitmaps: list[Struct] = []
    for slot, each in enumerate(ranges):
        if not each.allowed or not (each.read or each.write):
            raise MsrError(f"the msr range at {each.base:#x} is empty: leave it out", each.base)
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
