"""Where the threads of a machine's vCPUs wait while it is paused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from pykvm.errors import PykvmError
from pykvm.kvm import Vcpu
from pykvm.snapshot.pause_notice import tell_of_pause

__all__ = ["PauseError", "PauseGate"]

_PATIENCE: Final = 30.0  # seconds; a vCPU stops within microseconds unless its output waits


class PauseError(PykvmError):
    """A machine that cannot be paused."""


class PauseGate:
    """A gate that vCPUs' threads pass whenever `Vcpu.run` has returned `Stopped`.

    Open at first. A thread that waits at it has completed its vCPU's last exit, so that the vCPU's
    state is whole.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._members = 0
        self._waiting = 0

    # ---- threads of vCPUs -------------------------------------------------------------------

    @contextlib.contextmanager
    def member(self) -> Iterator[None]:
        """Count this thread among those that `close` waits for; wait first while it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._closed)
            self._members += 1
        try:
            yield
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()

    def passed(self) -> bool:
        """Wait while the gate is closed; return False if the machine has ended."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self._closed)
            self._waiting -= 1
            return not self._ended

    # ---- other threads ----------------------------------------------------------------------

    def close(self, vcpus: Sequence[Vcpu], patience: float = _PATIENCE) -> None:
        """Stop vCPUs; return when all their threads wait here, or have ended.

        Harmless twice.

        Raises:
            PauseError: one has not come within `patience` seconds; the gate is open again.
        """
        with self._changed:
            self._closed = True
            for vcpu in vcpus:
                vcpu.stop()
            if self._changed.wait_for(lambda: self._waiting == self._members, patience):
                return
            missing = self._members - self._waiting
            self._closed = False
            self._changed.notify_all()
        raise PauseError(
            f"{missing} processors of the guest do not stop: what they write is not read",
            "read the guest's output, then try again",
        )

    def open(self, vcpus: Sequence[Vcpu]) -> None:
        """Let vCPUs run on, and tell their guest that it was paused. Harmless twice."""
        with self._changed:
            if self._closed and not self._ended:
                tell_of_pause(vcpus)
            self._closed = False
            self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self, vcpus: Sequence[Vcpu]) -> Iterator[None]:
        """Keep the gate closed, and open it afterwards unless it was closed before."""
        was_closed = self._closed
        self.close(vcpus)
        try:
            yield
        finally:
            if not was_closed:
                self.open(vcpus)

    def end(self) -> None:
        """Let all threads go, for good."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
