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
        self._holds = 0
        self._ended = False
        self._members = 0
        self._waiting = 0

    # ---- threads of vCPUs -------------------------------------------------------------------

    @contextlib.contextmanager
    def member(self) -> Iterator[None]:
        """Count this thread among those that `close` waits for; wait first while it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._is_shut)
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
            self._changed.wait_for(lambda: self._ended or not self._is_shut)
            self._waiting -= 1
            return not self._ended

    # ---- other threads ----------------------------------------------------------------------

    def close(self, vcpus: Sequence[Vcpu], patience: float = _PATIENCE) -> None:
        """Stop vCPUs; return when all their threads wait here, or have ended.

        Harmless twice.

        Raises:
            PauseError: the machine has ended; or one has not come within `patience` seconds, and
                the gate is open again.
        """
        with self._changed:
            was_closed, self._closed = self._closed, True
            try:
                self._gather(vcpus, patience)
            except PauseError:
                self._closed = was_closed
                self._reopen(vcpus)
                raise

    def open(self, vcpus: Sequence[Vcpu]) -> None:
        """Let vCPUs run on, and tell their guest that it was paused. Harmless twice."""
        with self._changed:
            if self._closed:
                self._closed = False
                self._reopen(vcpus)

    @contextlib.contextmanager
    def closed(self, vcpus: Sequence[Vcpu]) -> Iterator[None]:
        """Keep the gate closed for the length of a with statement, whoever opens it meanwhile."""
        with self._changed:
            self._holds += 1
        try:
            with self._changed:
                self._gather(vcpus, _PATIENCE)
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._reopen(vcpus)

    @property
    def _is_shut(self) -> bool:
        return self._closed or self._holds > 0

    def _gather(self, vcpus: Sequence[Vcpu], patience: float) -> None:
        """Wait for all threads, with the lock."""
        for vcpu in vcpus:
            vcpu.stop()
        here = self._changed.wait_for(lambda: self._waiting == self._members, patience)
        if self._ended:
            raise PauseError("the machine has ended", "start it again")
        if not here:
            raise PauseError(
                f"{self._members - self._waiting} processors of the guest do not stop: what they "
                "write is not read",
                "read the guest's output, then try again",
            )

    def _reopen(self, vcpus: Sequence[Vcpu]) -> None:
        """Let vCPUs run on unless somebody keeps the gate closed, with the lock."""
        if self._is_shut or self._ended:
            return
        if self._waiting == self._members:  # a vCPU that runs cannot be told anything
            tell_of_pause(vcpus)
        self._changed.notify_all()

    def end(self) -> None:
        """Let all threads go, for good."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
