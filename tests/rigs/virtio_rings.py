"""The driver's side of one virtqueue, in Python over guest memory, so that no VM is needed.

It follows VIRTIO 1.2, 2.7 (split) and 2.8 (packed), with indirect descriptors and the event index,
and leaves nothing out that a device could get wrong. Tests of hostile drivers write what they like
with `write_descriptor` and the word views.
"""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pykvm.devices.virtio.device import Feature, Ring
from pykvm.memory.guest_memory import GuestMemory

__all__ = ["INDIRECT", "NEXT", "WRITE", "Buffer", "DriverQueue", "PackedQueue", "SplitQueue"]

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
EVENTS_ON, EVENTS_OFF, EVENTS_AT = range(3)

_lock = threading.Lock()


def full_fence() -> None:
    """Order every store before it before every load after it: a lock's instructions do."""
    with _lock:
        pass


@dataclass(frozen=True, slots=True)
class Buffer:
    """A part of guest memory that a descriptor describes."""

    gpa: int
    size: int
    writable: bool = False


def _passed(at: int, end: int, count: int) -> bool:
    return (end - at - 1) & 0xFFFF < count & 0xFFFF


class DriverQueue(ABC):
    """What both kinds of rings have.

    Args:
        memory: where the ring lies, in one region.
        at: GPA of its first byte, a multiple of 16.
        size: descriptors.
        features: of `Feature`, what is negotiated.
        index: the queue's number.
        table: entries of each indirect table.

    Attributes:
        end: GPA behind the ring and its indirect tables.
        kick, call: eventfds.
        words: all of the ring as 16-bit words, from its descriptors on.
    """

    fresh_base: int

    def __init__(
        self,
        memory: GuestMemory,
        at: int,
        size: int,
        features: int = 0,
        *,
        index: int = 0,
        table: int = 64,
    ) -> None:
        self.memory, self.size, self.index, self.table = memory, size, index, table
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.descriptors = at
        self.driver = at + 16 * size
        self.device = (self.driver + 6 + 2 * size + 15) & ~15
        self.tables = (self.device + 6 + 8 * size + 15) & ~15
        self.end = self.tables + 16 * table * size
        self.words = memory.view(at, self.tables - at).cast("H")
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.kicks = 0
        """How often the eventfd was written."""
        self.reset()

    def reset(self) -> None:
        """Begin anew, as a driver does after it has reset its device."""
        self.base = self.fresh_base
        self.calls = True
        self.words[:] = memoryview(bytes(self.words.nbytes)).cast("H")

    def ring(self) -> Ring:
        """Return the queue as a device is told of it; `base` says where it begins."""
        return Ring(
            index=self.index,
            size=self.size,
            descriptors=self.descriptors,
            driver=self.driver,
            device=self.device,
            base=self.base,
            kick=self.kick,
            call=self.call,
        )

    def word(self, gpa: int) -> int:
        """Return the place in `words` of a GPA."""
        return (gpa - self.descriptors) // 2

    def close(self) -> None:
        for descriptor in (self.kick, self.call):
            os.close(descriptor)
        self.words.release()

    @abstractmethod
    def write_descriptor(
        self, place: int, address: int, length: int, flags: int, last: int
    ) -> None:
        """Write a descriptor of the ring; `last` is its next one, or its identity."""

    @abstractmethod
    def make_available(self, buffers: Sequence[Buffer]) -> int | None:
        """Offer a chain; return a number for `take_used`, or None: the ring is full."""

    @abstractmethod
    def take_used(self) -> list[tuple[int, int]]:
        """Return each used chain's number and what was written, and ask for the next call."""

    @abstractmethod
    def want_calls(self, wanted: bool) -> None:
        """Ask for calls, or for none."""

    @abstractmethod
    def wants_kick(self) -> bool:
        """Return whether the device wants to know what was made available since the last time."""

    def notify(self, *, always: bool = False) -> bool:
        """Kick the device if it wants to know; return whether it was kicked."""
        full_fence()
        if not self.wants_kick() and not always:
            return False
        self.kicks += 1
        os.eventfd_write(self.kick, 1)
        return True

    def wait_call(self, timeout: float = 10.0) -> bool:
        """Wait for the device's call; return whether it came."""
        if not select.select([self.call], [], [], timeout)[0]:
            return False
        os.eventfd_read(self.call)
        return True

    def wait_used(self, count: int = 1, timeout: float = 10.0) -> list[tuple[int, int]]:
        """Return what was used when it is `count` chains, or when no call comes any more."""
        used = self.take_used()
        while len(used) < count and self.wait_call(timeout):
            used += self.take_used()
        return used

    def _write_entry(self, gpa: int, address: int, length: int, low: int, high: int) -> None:
        """Write 16 bytes; `low` and `high` are their last two words."""
        part = self.memory.view(gpa, 16)
        part[:8] = address.to_bytes(8, "little")
        part[8:12] = length.to_bytes(4, "little")
        part[12:14] = low.to_bytes(2, "little")
        part[14:] = high.to_bytes(2, "little")
        part.release()


class SplitQueue(DriverQueue):
    """A split ring (2.7)."""

    fresh_base = 0

    def reset(self) -> None:
        super().reset()
        self.free = list(range(self.size))
        self.chains: dict[int, list[int]] = {}
        self.next = self.told = self.seen = 0
        self.avail, self.used = self.word(self.driver), self.word(self.device)

    def write_descriptor(
        self, place: int, address: int, length: int, flags: int, last: int
    ) -> None:
        self._write_entry(self.descriptors + 16 * place, address, length, flags, last)

    def publish(self, head: int) -> None:
        """Make the chain of descriptors from `head` on available."""
        self.words[self.avail + 2 + self.next % self.size] = head
        self.next = (self.next + 1) & 0xFFFF
        self.words[self.avail + 1] = self.next

    def make_available(self, buffers: Sequence[Buffer]) -> int | None:
        table = self.indirect and 1 < len(buffers) <= self.table
        needed = 1 if table else len(buffers)
        if needed > len(self.free):
            return None
        places = [self.free.pop() for _ in range(needed)]
        head = places[0]
        self.chains[head] = places
        for n, buffer in enumerate(buffers):
            more = n + 1 < len(buffers)
            flags = NEXT * more | WRITE * buffer.writable
            if table:
                gpa = self.tables + 16 * (head * self.table + n)
                self._write_entry(gpa, buffer.gpa, buffer.size, flags, n + 1 if more else 0)
            else:
                following = places[n + 1] if more else 0
                self.write_descriptor(places[n], buffer.gpa, buffer.size, flags, following)
        if table:
            gpa = self.tables + 16 * head * self.table
            self.write_descriptor(head, gpa, 16 * len(buffers), INDIRECT, 0)
        self.publish(head)
        return head

    def wants_kick(self) -> bool:
        told, self.told = self.told, self.next
        if not self.event_idx:
            return not self.words[self.used] & 1
        return _passed(self.words[self.used + 2 + 4 * self.size], self.next, self.next - told)

    def take_used(self) -> list[tuple[int, int]]:
        taken = []
        while True:
            while self.seen != self.words[self.used + 1]:
                at = self.used + 2 + 4 * (self.seen % self.size)
                identity, written = self.words[at], self.words[at + 2] | self.words[at + 3] << 16
                self.free += self.chains.pop(identity, [])
                self.seen = (self.seen + 1) & 0xFFFF
                taken.append((identity, written))
            if not self.calls:
                return taken
            self.words[self.avail + 2 + self.size] = self.seen
            full_fence()
            if self.seen == self.words[self.used + 1]:
                return taken

    def want_calls(self, wanted: bool) -> None:
        """Ask for calls or for none; with an event index, none come before it has gone round."""
        self.calls = wanted
        if self.event_idx:
            self.words[self.avail + 2 + self.size] = (self.seen - (not wanted)) & 0xFFFF
        else:
            self.words[self.avail] = not wanted


class PackedQueue(DriverQueue):
    """A packed ring (2.8)."""

    fresh_base = 0x8000_8000  # both wrap counters begin at 1

    def reset(self) -> None:
        super().reset()
        self.free = list(range(self.size))
        self.room = self.size
        self.chains: dict[int, int] = {}
        self.next = self.seen = self.added = 0
        self.next_wrap = self.seen_wrap = True
        self._suppress(EVENTS_ON, 0)

    def write_descriptor(
        self, place: int, address: int, length: int, flags: int, last: int
    ) -> None:
        """Write everything before the flags, which make it available."""
        part = self.memory.view(self.descriptors + 16 * place, 14)
        part[:8] = address.to_bytes(8, "little")
        part[8:12] = length.to_bytes(4, "little")
        part[12:] = last.to_bytes(2, "little")
        part.release()
        self.words[8 * place + 7] = flags

    def available_flags(self, wrap: bool) -> int:
        return AVAIL if wrap else USED

    def make_available(self, buffers: Sequence[Buffer]) -> int | None:
        table = self.indirect and 1 < len(buffers) <= self.table
        needed = 1 if table else len(buffers)
        if needed > self.room or not self.free:
            return None
        identity = self.free.pop()
        entries = [(b.gpa, b.size, WRITE * b.writable) for b in buffers]
        if table:
            at = self.tables + 16 * identity * self.table
            for n, (gpa, size, flags) in enumerate(entries):
                self._write_entry(at + 16 * n, gpa, size, 0, flags)
            entries = [(at, 16 * len(buffers), INDIRECT)]
        self.chains[identity] = needed
        self.room -= needed
        self.added += needed
        first, first_flags = self.next, 0
        for n, (gpa, size, flags) in enumerate(entries):
            more = flags | NEXT * (n + 1 < needed)
            whole = more | self.available_flags(self.next_wrap)
            if n == 0:  # its flags publish the chain, so they come last
                first_flags, whole = whole, more | self.available_flags(not self.next_wrap)
            self.write_descriptor(self.next, gpa, size, whole, identity)
            self.next += 1
            if self.next == self.size:
                self.next, self.next_wrap = 0, not self.next_wrap
        self.words[8 * first + 7] = first_flags
        return identity

    def wants_kick(self) -> bool:
        added, self.added = self.added, 0
        at = self.word(self.device)
        flags, event = self.words[at + 1] & 3, self.words[at]
        if flags != EVENTS_AT or not self.event_idx:
            return flags != EVENTS_OFF
        place = event & 0x7FFF
        if event >> 15 != self.next_wrap:
            place -= self.size
        return _passed(place, self.next, added)

    def take_used(self) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        while True:
            while self._is_used():
                at = 8 * self.seen
                identity, written = (
                    self.words[at + 6],
                    self.words[at + 4] | self.words[at + 5] << 16,
                )
                slots = self.chains.pop(identity, 1)
                self.free.append(identity)
                self.room += slots
                self.seen += slots
                if self.seen >= self.size:
                    self.seen, self.seen_wrap = self.seen - self.size, not self.seen_wrap
                # Only a used descriptor with WRITE has a length (2.8.5).
                taken.append((identity, written if self.words[at + 7] & WRITE else 0))
            if not self.calls:
                return taken
            place = self.seen | self.seen_wrap << 15
            self._suppress(EVENTS_AT if self.event_idx else EVENTS_ON, place)
            full_fence()
            if not self._is_used():
                return taken

    def want_calls(self, wanted: bool) -> None:
        """Ask for calls, or for none."""
        self.calls = wanted
        self._suppress(EVENTS_ON if wanted else EVENTS_OFF, 0)

    def _is_used(self) -> bool:
        flags = self.words[8 * self.seen + 7]
        return bool(flags & AVAIL) == bool(flags & USED) == self.seen_wrap

    def _suppress(self, flags: int, place: int) -> None:
        whole = self.memory.view(self.driver, 4).cast("I")
        whole[0] = flags << 16 | place
        whole.release()
