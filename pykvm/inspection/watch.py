"""`ProgressWatch`: tells when a guest makes no progress any more."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.inspection.hang import Progress, Sample, compare, report, sample
from pykvm.inspection.machine import Inspectable

__all__ = ["ProgressWatch"]


class ProgressWatch(Closeable):
    """A thread that looks at a machine now and then, which stops the vCPUs for less than 1 ms each.

    It tells once that a guest is stuck, and again only after there was progress. While the machine
    is paused or a debugger is attached it does not look.

    Args:
        machine: the machine.
        tell: called in the watch's thread, with a line and a report (`hang.report`).
        interval: seconds between two looks.
        patience: number of intervals without progress after which it tells. A guest that can never
            go on is told at once.
    """

    def __init__(
        self,
        machine: Inspectable,
        tell: Callable[[str], object],
        *,
        interval: float = 10.0,
        patience: int = 3,
    ) -> None:
        self._machine = machine
        self._tell = tell
        self._interval = interval
        self._patience = patience
        self._before: dict[int, Sample] = {}
        self._stuck_for: Counter[int] = Counter()
        self._told = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """True until the watch is closed or the machine has ended."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Look no more. Harmless twice."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        gate = self._machine.gate
        while not self._closed.wait(self._interval) and not gate.closed:
            if gate.is_paused or gate.is_debugged:
                self._before = {}
                continue
            with suppress(PykvmError):  # the machine ends, or a device does not answer
                self._look()

    def _look(self) -> None:
        now = sample(self._machine)
        found = compare(self._before, now)
        self._before = now
        self._stuck_for = Counter({n: self._stuck_for[n] + 1 for n in found.stuck})
        if not found.stuck:
            self._told = False
        elif not self._told and (found.dead or max(self._stuck_for.values()) >= self._patience):
            self._told = True
            self._tell(f"{_headline(found)}\n{report(self._machine)}")


def _headline(found: Progress) -> str:
    what = "cannot go on" if found.dead else "makes no progress"
    return f"the guest {what}: " + ", ".join(f"vcpu {n} {why}" for n, why in found.stuck.items())
