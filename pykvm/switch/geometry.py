"""Size of a switch and layout of its memory, with numbers from switch.h."""

from __future__ import annotations

from dataclasses import dataclass

from pykvm.errors import PykvmError
from pykvm.switch._native import ffi, lib

__all__ = [
    "DEFAULT_FRAME_LIMIT",
    "MAX_BURST",
    "MAX_FRAME",
    "MAX_PORTS",
    "MAX_TAGS",
    "MIN_FRAME",
    "TAG_BYTES",
    "WINDOWS_ALIGNMENT",
    "SwitchConfig",
    "SwitchConfigError",
]

MAX_PORTS: int = lib.SWITCH_MAX_PORTS
MAX_BURST: int = lib.SWITCH_MAX_BURST
MIN_FRAME: int = lib.SWITCH_MIN_FRAME
MAX_FRAME: int = lib.SWITCH_MAX_FRAME
DEFAULT_FRAME_LIMIT: int = lib.SWITCH_DEFAULT_FRAME
TAG_BYTES: int = lib.SWITCH_TAG_BYTES
MAX_TAGS: int = lib.SWITCH_MAX_TAGS

WINDOWS_ALIGNMENT = 2 << 20
"""Windows start at the next multiple of this behind the shared memory, as in a shared object."""


class SwitchConfigError(PykvmError, ValueError):
    """A switch that cannot be built."""


def _require(holds: bool, problem: str, next_step: str) -> None:
    if not holds:
        raise SwitchConfigError(problem, next_step)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@dataclass(frozen=True)
class SwitchConfig:
    """Shape of one switch.

    Attributes:
        ports: 2 to 64, one for each guest.
        lane_slots: frames that fit into one lane, a power of two; all lanes together take
            ports * ports * lane_slots * 2 KiB.
        tx_slots: transmit slots of a port and its longest burst, a power of two up to 256.
        frame_limit: longest frame in bytes, without checksum, 14 to 2040; each VLAN tag of a frame
            allows 4 bytes more, up to 8 tags and 2040 bytes.
        max_age: epochs (`Switch.tick`) of silence after which a station is forgotten, up to 50.
        group_forward_mask: bit n lets frames to 01-80-C2-00-00-0n through, group addresses that a
            bridge does not forward (IEEE 802.1Q table 8-1; like group_fwd_mask of Linux's bridge).

    Raises:
        SwitchConfigError: a switch of this shape cannot be built.
    """

    ports: int = 2
    lane_slots: int = 256
    tx_slots: int = 256
    frame_limit: int = DEFAULT_FRAME_LIMIT
    max_age: int = 30
    group_forward_mask: int = 0

    def __post_init__(self) -> None:
        _require(
            2 <= self.ports <= MAX_PORTS,
            f"a switch has 2 to {MAX_PORTS} ports",
            f"change ports={self.ports}",
        )
        for name, slots, largest in (
            ("lane_slots", self.lane_slots, lib.SWITCH_MAX_LANE_SLOTS),
            ("tx_slots", self.tx_slots, lib.SWITCH_MAX_TX_SLOTS),
        ):
            _require(
                _is_power_of_two(slots) and slots <= largest,
                f"{name} is a power of two up to {largest}",
                f"change {name}={slots}",
            )
        _require(
            MIN_FRAME <= self.frame_limit <= MAX_FRAME,
            f"a port's frame limit is {MIN_FRAME} to {MAX_FRAME} bytes",
            f"change frame_limit={self.frame_limit}",
        )
        _require(
            1 <= self.max_age <= lib.SWITCH_MAX_AGE,
            f"stations are kept 1 to {lib.SWITCH_MAX_AGE} epochs",
            f"change max_age={self.max_age}",
        )
        _require(
            0 <= self.group_forward_mask <= 0xFFFF,
            "a group_forward_mask has 16 bits",
            f"change {self.group_forward_mask:#x}",
        )

    @property
    def shared_size(self) -> int:
        """Bytes of the switch's own memory."""
        return int(ffi.sizeof("struct switch_shared"))

    @property
    def window_size(self) -> int:
        """Bytes of one port's window, a multiple of 4096."""
        return int(lib.switch_window_size(self.ports, self.tx_slots, self.lane_slots))

    @property
    def windows_offset(self) -> int:
        """Offset of window 0 in a buffer with the shared memory and then all windows."""
        return -(-self.shared_size // WINDOWS_ALIGNMENT) * WINDOWS_ALIGNMENT

    @property
    def total_size(self) -> int:
        """Bytes of a buffer that holds the shared memory and all windows."""
        return self.windows_offset + self.ports * self.window_size

    def tx_length_offset(self, slot: int) -> int:
        """Return the offset of a transmit slot's 32-bit length in its window."""
        return int(ffi.offsetof("struct switch_window", "tx_length", slot))

    def tx_offset(self, slot: int) -> int:
        """Return the offset of a transmit slot's frame in its window."""
        return int(lib.switch_tx_offset(slot))

    def lane_head_offset(self, source: int) -> int:
        """Return the offset of the head, the 32-bit count of frames from `source`, in a window."""
        return int(ffi.offsetof("struct switch_window", "lane", source, "head"))

    def lane_tail_offset(self, source: int) -> int:
        """Return the offset of the tail, the 32-bit count of frames taken, in a window."""
        return int(ffi.offsetof("struct switch_window", "lane", source, "tail"))

    def lane_offset(self, source: int) -> int:
        """Return the offset of the first slot of the lane from `source` in a window."""
        return int(lib.switch_lane_offset(self.tx_slots, self.lane_slots, source))
