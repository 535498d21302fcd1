"""Threads in which the vCPUs of a guest run, one each, with their results and failures."""

import threading
from collections.abc import Callable, Collection, Mapping

from pykvm.kvm import Vcpu
from pykvm.machine.bare.failures import GuestTimeoutError

__all__ = ["VcpuThreads"]


class _VcpuThread:
    """The thread of one vCPU; `outcome` is its status or its failure, once it has ended."""

    def __init__(self, vcpu: Vcpu, run: Callable[[], int], ended: Callable[[], None]) -> None:
        self.vcpu = vcpu
        self.outcome: int | BaseException | None = None
        self._run = run
        self._ended = ended
        self.thread = threading.Thread(target=self._body, name=f"vcpu {vcpu.id}", daemon=True)
        self.thread.start()

    def _body(self) -> None:
        try:
            self.outcome = self._run()
        except BaseException as error:
            self.outcome = error
        self._ended()


class VcpuThreads:
    """The threads of a guest's vCPUs, by the vCPUs' numbers."""

    def __init__(self) -> None:
        self._threads: dict[int, _VcpuThread] = {}
        self._changed = threading.Condition()

    @property
    def started(self) -> list[int]:
        """Numbers of the vCPUs that were started, and for which nobody has waited yet."""
        return sorted(self._threads)

    def native_id(self, number: int) -> int:
        """Return the kernel's id of a started vCPU's thread."""
        found = self._threads[number].thread.native_id
        assert found is not None
        return found

    def start(self, runs: Mapping[int, tuple[Vcpu, Callable[[], int]]]) -> None:
        """Run vCPUs in threads of their own; none if one of them cannot be started.

        Args:
            runs: by the vCPU's number, the vCPU and what runs it.

        Raises:
            RuntimeError: a vCPU was started before, and nobody has waited for it.
        """
        if again := [str(number) for number in runs if number in self._threads]:
            raise RuntimeError(f"vcpu {', '.join(again)} runs already: wait() for it first")
        for number, (vcpu, run) in runs.items():
            self._threads[number] = _VcpuThread(vcpu, run, self._notify)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait(self, numbers: Collection[int], timeout: float | None) -> list[int]:
        """Wait until all of these vCPUs have finished; return their statuses.

        If one fails, or the time is over, the others are stopped.

        Args:
            numbers: numbers of started vCPUs.
            timeout: seconds to wait at most; None for no limit.

        Raises:
            RuntimeError: one of them was not started.
            GuestTimeoutError: some did not finish in time.
            Exception: the first failure of a vCPU.
        """
        if missing := [str(number) for number in numbers if number not in self._threads]:
            raise RuntimeError(f"vcpu {', '.join(missing)} has not been started: start() it first")
        waited = {number: self._threads[number] for number in numbers}

        def failures() -> list[BaseException]:
            found = (each.outcome for each in waited.values())
            return [outcome for outcome in found if isinstance(outcome, BaseException)]

        def over() -> bool:
            return bool(failures()) or all(each.outcome is not None for each in waited.values())

        with self._changed:
            self._changed.wait_for(over, timeout)
            failed = failures()
        self._end(waited)
        # The time may run out just when one fails: its failure says more than our stop.
        failed = failed or [each for each in failures() if not isinstance(each, GuestTimeoutError)]
        if failed:
            raise failed[0]
        if stopped := failures():
            where = "; ".join(getattr(each, "problem", "") for each in stopped)
            raise GuestTimeoutError(
                f"the guest did not finish in {timeout} s: {where}", "give it more time"
            ) from stopped[0]
        return [each.outcome for each in waited.values() if isinstance(each.outcome, int)]

    def stop(self) -> None:
        """Stop all started vCPUs and wait for their threads."""
        self._end(dict(self._threads))

    def _end(self, threads: dict[int, _VcpuThread]) -> None:
        for each in threads.values():
            if each.outcome is None:
                each.vcpu.stop()
        for number, each in threads.items():
            each.thread.join()
            del self._threads[number]
