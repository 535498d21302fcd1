"""KVM's binary statistics (KVM_GET_STATS_FD): names and values of a VM or a vCPU.

The descriptor describes itself: a header, an id string, descriptors, values. Nothing here knows
a name, so whatever the running kernel counts is read.

Source: Documentation/virt/kvm/api.rst 4.133; include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from pykvm.kvm.handle import Handle
from pykvm.kvm.ioctls import Scope
from pykvm.kvm.native import ffi, lib

__all__ = ["Statistic", "Stats"]


def _names(prefix: str) -> dict[int, str]:
    skip = ("_SHIFT", "_MASK", "_MAX")
    return {
        getattr(lib, name): name.removeprefix(prefix).lower().replace("_", " ")
        for name in dir(lib)
        if name.startswith(prefix) and not name.endswith(skip)
    }


_TYPES = _names("KVM_STATS_TYPE_")
_UNITS = _names("KVM_STATS_UNIT_")


@dataclass(frozen=True, slots=True)
class Statistic:
    """Description of one statistic: it counts `base` to the power of `exponent` units.

    Attributes:
        name: the kernel's name.
        kind: "cumulative", "instant", "peak", "linear hist", "log hist", or "type N" of a newer
            kernel.
        unit: "none", "bytes", "seconds", "cycles", "boolean" or "unit N".
        base: 2 or 10.
        exponent: of the base.
        size: number of 64-bit values.
        offset: bytes from the first statistic's values.
        bucket_size: width of a bucket of a linear histogram.
    """

    name: str
    kind: str
    unit: str
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


class Stats(Handle):
    """The statistics of one VM or vCPU; reading does not disturb a running vCPU.

    A forked process may read them too.

    Attributes:
        id: the kernel's name for the VM or vCPU, such as "kvm-1234/vcpu-0".
        statistics: their descriptions.
    """

    scope: ClassVar[Scope] = Scope.DEVICE

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        header = ffi.new("struct kvm_stats_header *")
        ffi.buffer(header)[:] = os.pread(fd, ffi.sizeof("struct kvm_stats_header"), 0)
        raw_id = os.pread(fd, header.name_size, header.id_offset)
        self.id = raw_id.split(b"\0", 1)[0].decode()
        self._data_offset: int = header.data_offset
        self.statistics = self._read_descriptors(header.desc_offset, header)
        self._words = max((s.offset // 8 + s.size for s in self.statistics), default=0)

    def _read_descriptors(self, offset: int, header: object) -> tuple[Statistic, ...]:
        name_size: int = header.name_size  # type: ignore[attr-defined]
        count: int = header.num_desc  # type: ignore[attr-defined]
        stride = ffi.offsetof("struct kvm_stats_desc", "name") + name_size
        block = ffi.from_buffer(os.pread(self.fileno(), stride * count, offset))
        result = []
        for number in range(count):
            desc = ffi.cast("struct kvm_stats_desc *", block + number * stride)
            kind = desc.flags & lib.KVM_STATS_TYPE_MASK
            unit = desc.flags & lib.KVM_STATS_UNIT_MASK
            base = desc.flags & lib.KVM_STATS_BASE_MASK
            result.append(
                Statistic(
                    name=ffi.string(ffi.cast("char *", desc.name), name_size).decode(),
                    kind=_TYPES.get(kind, f"type {kind >> lib.KVM_STATS_TYPE_SHIFT}"),
                    unit=_UNITS.get(unit, f"unit {unit >> lib.KVM_STATS_UNIT_SHIFT}"),
                    base=2 if base == lib.KVM_STATS_BASE_POW2 else 10,
                    exponent=desc.exponent,
                    size=desc.size,
                    offset=desc.offset,
                    bucket_size=desc.bucket_size,
                )
            )
        return tuple(result)

    def read(self) -> dict[str, int | list[int]]:
        """Return the value of each name; a list of the buckets for a histogram."""
        data = os.pread(self.fileno(), self._words * 8, self._data_offset)
        words = memoryview(data).cast("Q")
        result: dict[str, int | list[int]] = {}
        for each in self.statistics:
            first = each.offset // 8
            if each.size == 1:
                result[each.name] = words[first]
            else:
                result[each.name] = list(words[first : first + each.size])
        return result

    def value(self, name: str) -> int:
        """Return one value.

        Raises:
            KeyError: the kernel has no such name; the message lists those there are.
        """
        for each in self.statistics:
            if each.name == name:
                data = os.pread(self.fileno(), 8, self._data_offset + each.offset)
                return int.from_bytes(data, "little")
        raise KeyError(f"no statistic {name!r} in {self.id}: use one of {self.names()}")

    def names(self) -> list[str]:
        """Return every name, sorted."""
        return sorted(each.name for each in self.statistics)
