"""`VcpuGate`: runs the vCPUs of a machine in their threads, and parks them where they can be seen.

A vCPU is parked between two runs, after `Vcpu.run` has returned `Stopped`. KVM has then finished
the last port or MMIO access, so that registers can be read, changed and saved (api.rst 5, "the
userspace should re-enter the guest with pending operations"). The thread of each vCPU calls
`VcpuGate.run`, which returns when the gate is closed. Any other thread pauses the machine with
`VcpuGate.paused`, and looks at the vCPUs meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Protocol

from pykvm.errors import PykvmError
from pykvm.kvm import Debug, Exit, KvmError, Stopped, Vcpu

__all__ = ["DebugListener", "PauseError", "VcpuGate"]

_PATIENCE: Final = 30.0  # seconds; a vCPU stops within microseconds unless its output waits
_NOTICED: Final = 0.1  # seconds; shorter stops worry no watchdog
_GONE_SOON: Final = 0.5  # seconds until a debugger that has gone is noticed


class PauseError(PykvmError):
    """A machine that cannot be paused."""


class DebugListener(Protocol):
    """A debugger. The gate calls it without a lock."""

    def debug_exit(self, vcpu: Vcpu, found: Debug) -> None:
        """Take a `Debug` exit, in the vCPU's thread; it must not wait for the gate.

        The vCPU runs on afterwards, unless the listener holds it (`VcpuGate.hold`).
        """

    def machine_ended(self) -> None:
        """Take note that the gate is closed, from any thread."""


class VcpuGate:
    """Gate through which the vCPUs of a machine pass before they run.

    Two independent reasons keep a vCPU parked: the machine is paused (`pause`, which nests), or the
    vCPU is held (`hold`, for debuggers). A guest that uses kvmclock is told of longer stops, so
    that its watchdogs do not bite.
    """

    def __init__(self) -> None:
        self._listener: DebugListener | None = None
        self._changed = threading.Condition()
        self._inside: dict[int, Vcpu] = {}
        self._threads: set[int] = set()
        self._held: set[int] = set()
        self._pauses = 0
        self._closed = False

    # ---- vCPU threads -----------------------------------------------------------------------

    def run(self, vcpu: Vcpu, serve: Callable[[Exit], object]) -> None:
        """Run a vCPU in the calling thread until the gate is closed.

        Args:
            vcpu: the vCPU.
            serve: called with each exit but `Stopped` and `Debug`. It may close the gate, and must
                not pause it.

        Raises:
            KvmError: see `Vcpu.run`.
        """
        me = threading.get_ident()
        with self._changed:
            self._threads.add(me)
        try:
            while self._admit(vcpu):
                while not isinstance(found := vcpu.run(), Stopped):
                    if isinstance(found, Debug):
                        if (listener := self._listener) is not None:
                            listener.debug_exit(vcpu, found)
                    else:
                        serve(found)
                    if self._closed:
                        break
        finally:
            with self._changed:
                self._threads.discard(me)
                self._inside.pop(vcpu.id, None)
                self._changed.notify_all()

    def _admit(self, vcpu: Vcpu) -> bool:
        """Park the vCPU as long as it has to; return False if the gate is closed."""
        with self._changed:
            if self._inside.pop(vcpu.id, None) is not None:
                self._changed.notify_all()
            begun = time.monotonic()
            self._changed.wait_for(lambda: self._closed or not self._parks(vcpu.id))
            if self._closed:
                return False
            if time.monotonic() - begun > _NOTICED:
                # CapabilityMissingError, or EINVAL: the guest does not use kvmclock.
                with suppress(KvmError):
                    vcpu.kvmclock_ctrl()
            self._inside[vcpu.id] = vcpu
            return True

    def _parks(self, number: int) -> bool:
        return self._pauses > 0 or number in self._held

    # ---- the whole machine ------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the machine for the length of a with statement."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Park all vCPUs, now and when they start, and wait until they are parked.

        Pauses nest: each needs a `resume`.

        Raises:
            PauseError: a vCPU's thread calls, a vCPU does not stop, or the machine has ended. It is
                not paused.
        """
        if threading.get_ident() in self._threads:
            raise PauseError(
                "a vcpu's thread cannot wait until the vcpu is parked", "pause from another thread"
            )
        with self._changed:
            if self._closed:
                raise PauseError("the machine has ended", "start it again")
            self._pauses += 1
            self._stop(self._inside)
        try:
            self.settle()
        except PauseError:
            self.resume()
            raise

    def resume(self) -> None:
        """Take one `pause` back.

        Raises:
            PauseError: there was none.
        """
        with self._changed:
            if not self._pauses:
                raise PauseError("the machine is not paused", "call pause() first")
            self._pauses -= 1
            self._changed.notify_all()

    @property
    def is_paused(self) -> bool:
        """True between `pause` and the last `resume`."""
        return self._pauses > 0

    def close(self) -> None:
        """Make each `run` return, also of parked vCPUs. From any thread; does not wait."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._stop(self._inside)
            self._changed.notify_all()
        if first and (listener := self._listener) is not None:
            listener.machine_ended()

    @property
    def closed(self) -> bool:
        return self._closed

    # ---- debuggers --------------------------------------------------------------------------

    def attach(self, listener: DebugListener) -> None:
        """Send `Debug` exits to a debugger; there is one at a time.

        Raises:
            PauseError: another one is attached, and stays.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._listener is None, _GONE_SOON):
                raise PauseError("another debugger is attached", "detach it first")
            self._listener = listener

    def detach(self) -> None:
        """Send `Debug` exits to nobody."""
        with self._changed:
            self._listener = None
            self._changed.notify_all()

    @property
    def is_debugged(self) -> bool:
        """True if a debugger is attached."""
        return self._listener is not None

    # ---- single vCPUs -----------------------------------------------------------------------

    def hold(self, numbers: Iterable[int]) -> None:
        """Park vCPUs by their ids, also one in whose thread this is called. Does not wait."""
        with self._changed:
            self._held.update(numbers)
            self._stop(self._held & self._inside.keys())

    def release(self, numbers: Iterable[int]) -> None:
        """Take `hold` back. Paused vCPUs stay parked until the machine is resumed."""
        with self._changed:
            self._held.difference_update(numbers)
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until each vCPU that has to park is parked, or has not been started.

        Raises:
            PauseError: one is not within 30 seconds.
        """

        def left() -> list[int]:
            return [number for number in self._inside if self._parks(number)]

        with self._changed:
            if not self._changed.wait_for(lambda: not left(), _PATIENCE):
                raise PauseError(
                    f"vcpu {left()[0]} does not stop: nobody reads what it writes, or a device "
                    "does not answer",
                    "read the guest's output, then try again",
                )

    def _stop(self, numbers: Iterable[int]) -> None:
        # A stop that comes before run() counts too, so no vCPU enters the guest after this.
        for number in numbers:
            self._inside[number].stop()
