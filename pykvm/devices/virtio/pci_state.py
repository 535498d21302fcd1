"""Registers of virtio over PCI as values for JSON, and back, checked.

What a snapshot holds of a device: pykvm.devices.virtio.pci.VirtioPci.save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pykvm.devices.pci.function import PciStateError

__all__ = ["QUEUE_BITS", "REGISTER_BITS", "read_bases", "read_flags", "read_numbers"]

REGISTER_BITS: Final = {
    "device_feature_select": 32,
    "driver_feature_select": 32,
    "driver_features": 64,
    "config_vector": 16,
    "status": 8,
    "generation": 8,
    "queue_select": 16,
}
"""Bits of each register that belongs to no queue."""

QUEUE_BITS: Final = {"size": 16, "vector": 16, "descriptors": 64, "driver": 64, "device": 64}
"""Bits of each register of a queue, but for the flag that it is enabled."""


def read_numbers(values: Any, bits: Mapping[str, int]) -> dict[str, int]:
    """Return registers by name.

    Raises:
        PciStateError: one is not there, or has too many bits.
    """
    found = {}
    for name, width in bits.items():
        value = values.get(name) if isinstance(values, dict) else None
        if type(value) is not int or not 0 <= value < 1 << width:
            raise PciStateError(name)
        found[name] = value
    return found


def read_flags(values: Any, names: Sequence[str]) -> list[bool]:
    """Return flags.

    Raises:
        PciStateError: one is not there.
    """
    found = [values.get(name) if isinstance(values, dict) else None for name in names]
    if not all(isinstance(flag, bool) for flag in found):
        raise PciStateError(" or ".join(names))
    return [flag is True for flag in found]


def read_bases(values: Any, queues: int) -> dict[int, int]:
    """Return where rings have come to, by the numbers of their queues.

    Raises:
        PciStateError: these are no pairs, or there is no such queue.
    """
    if not isinstance(values, list):
        raise PciStateError("bases")
    for pair in values:
        if not isinstance(pair, list) or [type(one) for one in pair] != [int, int]:
            raise PciStateError("bases")
        if not 0 <= pair[0] < queues or not 0 <= pair[1] < 1 << 32:
            raise PciStateError("bases")
    return dict(values)
