"""Where the parts of a virtqueue lie in guest memory, checked before somebody else uses them.

Source: VIRTIO 1.2, sections 2.7 and 2.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pykvm.devices.virtio.device import Feature, Ring
from pykvm.errors import PykvmError
from pykvm.memory.regions import Region

__all__ = ["Part", "RingAddressError", "check_rings", "ring_parts"]


class RingAddressError(PykvmError, ValueError):
    """A virtqueue that its driver has set up where it cannot be."""


class Part(NamedTuple):
    """A part of a virtqueue.

    Attributes:
        name: as the specification has it.
        gpa: guest physical address.
        size: bytes.
        alignment: what the address has to be a multiple of.
    """

    name: str
    gpa: int
    size: int
    alignment: int


def ring_parts(ring: Ring, features: int) -> tuple[Part, Part, Part]:
    """Return the descriptors, the driver area and the device area of a ring.

    Args:
        ring: the ring, of whatever size.
        features: those that were negotiated.
    """
    if features & Feature.RING_PACKED:
        return (
            Part("descriptor ring", ring.descriptors, 16 * ring.size, 16),
            Part("driver event suppression", ring.driver, 4, 4),
            Part("device event suppression", ring.device, 4, 4),
        )
    # Both rings end with the other side's event index, whether or not it is used.
    return (
        Part("descriptor table", ring.descriptors, 16 * ring.size, 16),
        Part("available ring", ring.driver, 6 + 2 * ring.size, 2),
        Part("used ring", ring.device, 6 + 8 * ring.size, 4),
    )


def check_rings(
    rings: Sequence[Ring], features: int, queue_sizes: Sequence[int], regions: Sequence[Region]
) -> None:
    """Check that each part of each ring lies inside one region, and that there is such a queue.

    Args:
        rings: what the driver has set up.
        features: those that were negotiated.
        queue_sizes: the most descriptors of each queue.
        regions: memory that the data plane can use.

    Raises:
        RingAddressError: a ring does not.
    """
    for ring in rings:
        if not 0 <= ring.index < len(queue_sizes):
            raise RingAddressError(f"there is no virtqueue {ring.index}")
        if not 1 <= ring.size <= queue_sizes[ring.index]:
            raise RingAddressError(
                f"virtqueue {ring.index} of {ring.size} descriptors, it takes 1 to "
                f"{queue_sizes[ring.index]}"
            )
        if ring.size & (ring.size - 1) and not features & Feature.RING_PACKED:
            raise RingAddressError(
                f"virtqueue {ring.index} of {ring.size} descriptors, not a power of 2"
            )
        for part in ring_parts(ring, features):
            inside = any(
                region.gpa <= part.gpa and part.gpa + part.size <= region.end for region in regions
            )
            if not inside or part.gpa % part.alignment:
                raise RingAddressError(
                    f"the {part.name} of virtqueue {ring.index} at {part.gpa:#x} is "
                    + ("not aligned" if inside else "outside of guest memory")
                )
    if len({ring.index for ring in rings}) != len(rings):
        raise RingAddressError("a virtqueue that is there twice")
