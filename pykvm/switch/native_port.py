"""A port used from the host, in place of a guest: native tests and benchmarks.

It does with its window what a guest's library does, and calls the native build of the switch.
"""

from __future__ import annotations

from collections.abc import Sequence

from pykvm.errors import PykvmError
from pykvm.switch._native import ffi, lib
from pykvm.switch.geometry import MAX_FRAME
from pykvm.switch.switch import Switch

__all__ = ["NativePort", "SwitchCallError"]


class SwitchCallError(PykvmError):
    """A call that the switch refused; `errno` says why."""

    def __init__(self, errno: int) -> None:
        reasons = {
            lib.ELISA_EPERM: ("the call names a port that is not the caller's", "use its own"),
            lib.ELISA_EINVAL: ("unknown operation, flag, or too many frames", "check the request"),
            lib.ELISA_ENETDOWN: ("the port is not enabled", "call Switch.enable first"),
        }
        super().__init__(*reasons.get(errno, (f"the switch refused the call with errno {errno}",)))
        self.errno = errno


class NativePort:
    """Port `number` of `switch`, served by the native build on the calling thread.

    One thread at a time may send and one may receive; they need not be the same. Both release
    Python's lock while C works.
    """

    def __init__(self, switch: Switch, number: int) -> None:
        self.switch = switch
        self.number = number
        self._env = switch.native_env(number)
        self._window = switch.window(number)
        self._shared = ffi.cast("struct switch_shared *", self._env.shared)
        self._next_slot = 0

    def call(self, a0: int, a1: int, a2: int) -> int:
        """Call ``elisa_serve(a0, a1, a2)`` as this port's guest; return the frames dealt with.

        Raises SwitchCallError.
        """
        result = int(lib.elisa_serve(a0, a1, a2, self._env))
        if result >= 1 << 63:
            raise SwitchCallError((1 << 64) - result)
        return result

    def put(self, slot: int, frame: bytes, length: int | None = None) -> None:
        """Write a transmit slot; `length` other than the frame's own is for hostile senders."""
        lib.switch_window_put(self._window, slot, frame, len(frame))
        if length is not None:
            ffi.cast("struct switch_window *", self._window).tx_length[slot] = length

    def send(self, frames: Sequence[bytes], *, wait: bool = False) -> int:
        """Send up to `tx_slots` frames in one call; return how many were dealt with.

        Fewer than all only with `wait`, when the only receiver of the next one has no room.
        Raises SwitchCallError.
        """
        tx_slots = self.switch.config.tx_slots
        first = self._next_slot
        for index, frame in enumerate(frames[:tx_slots]):
            self.put((first + index) % tx_slots, frame)
        flags = lib.SWITCH_WAIT if wait else 0
        done = self.call(
            lib.SWITCH_OP_SEND | self.number << 8 | flags, first, min(len(frames), tx_slots)
        )
        self._next_slot = (first + done) % tx_slots
        return done

    def receive(self, source: int, limit: int = 256) -> list[bytes]:
        """Return up to `limit` frames of the lane from `source`, oldest first."""
        frames = ffi.new("uint8_t[]", limit * MAX_FRAME)
        lengths = ffi.new("uint32_t[]", limit)
        count = lib.switch_window_take(self._shared, self._window, source, frames, lengths, limit)
        taken = []
        offset = 0
        for length in lengths[0:count]:
            taken.append(bytes(ffi.buffer(frames + offset, length)))
            offset += length
        return taken

    def receive_all(self, limit: int = 256) -> list[bytes]:
        """Return up to `limit` frames of every lane, lane after lane."""
        ports = range(self.switch.config.ports)
        return [frame for source in ports for frame in self.receive(source, limit)]
