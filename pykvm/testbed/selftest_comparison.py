"""KVM's own selftests on the emulated host, with the unpatched and with the patched modules.

Both sides are built from the same source in the same way, so that only the patch differs. The
distribution's own modules can be compared instead; their compiler options differ as well. A
selftest is the same on both sides if its exit status, its output and the kernel's warnings are the
same. Numbers are ignored, because they hold times and addresses.
"""

import difflib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.commands import program
from pykvm.kernel import build as kernel
from pykvm.kernel import selftests as kernel_selftests
from pykvm.kernel.packages import find_source
from pykvm.kernel.series import newest_kernel, packages_directory
from pykvm.testbed.session import CommandTimeoutError, HostDiedError, Testbed

__all__ = [
    "EXCLUDED",
    "LIMIT",
    "SLOW",
    "Comparison",
    "Result",
    "SelftestUnknownError",
    "Selftests",
    "choose",
    "compare",
    "parse",
]

# Seconds of the emulated clock that one selftest may take; 45 million instructions each.
LIMIT = 30.0

# Selftests that take more than a few seconds, with the reason. They run only with `slow` or by
# name.
SLOW: Mapping[str, str] = {
    "x86_64/hyperv_clock": "waits for clocks that pass slowly here",
    "x86_64/hyperv_features": "0.3 billion instructions",
    "x86_64/tsc_scaling_sync": "waits for clocks that pass slowly here",
    "x86_64/vmx_nested_tsc_scaling_test": "0.2 billion instructions",
    "x86_64/vmx_preemption_timer_test": "waits for clocks that pass slowly here",
    "x86_64/xapic_ipi_test": "two vCPUs poll for each other on one processor",
    "x86_64/xapic_state_test": "0.4 billion instructions",
    "kvm_create_max_vcpus": "creates 2048 vCPUs",
}

# Selftests whose result has no meaning on the emulated host, with the reason.
EXCLUDED: Mapping[str, str] = {
    "dirty_log_test": "wants more memory than the emulated host has",
    "hardware_disable_test": "stops 512 VMs at random times, hours on one emulated processor",
    "x86_64/hyperv_ipi": "vCPUs wait for each other on one processor: chance ends it",
    "x86_64/hyperv_tlb_flush": "vCPUs wait for each other on one processor: chance ends it",
    "max_guest_memory_test": "wants more memory than the emulated host has",
    "memslot_modification_stress_test": "wants more memory than the emulated host has",
    "memslot_perf_test": "takes more than 30 s of the emulated clock",
    "set_memory_region_test": "hangs the emulated host, so that no time limit ends it",
}

# Arguments of selftests that need more memory by default than the emulated host has.
_ARGUMENTS: Mapping[str, str] = {
    "demand_paging_test": "-b 16M",
    "dirty_log_perf_test": "-b 16M",
    "kvm_page_table_test": "-b 16M",
}

_SKIPPED = 4  # exit status of a skipped selftest: KSFT_SKIP of the kernel's kselftest.h
_RUNNER = Path(__file__).with_name("inside") / "selftest_runner.py"

# If the host stops, the rest of its batch runs again, after a timeout for the whole batch.
_BATCH = 12
_SECONDS_FOR_EACH = 10.0


class SelftestUnknownError(PykvmError):
    """No selftest of this series has such a name."""


@dataclass(frozen=True)
class Result:
    """Result of one selftest.

    Attributes:
        status: exit status; None if the selftest exceeded its time limit.
        seconds: seconds of the emulated clock that it took.
        output: its output.
        log: the kernel's warnings while it ran.
        host_died: why the emulated host ended during the selftest; empty if it did not.
    """

    status: int | None
    seconds: float = 0.0
    output: str = ""
    log: list[str] = field(default_factory=list)
    host_died: str = ""

    @property
    def verdict(self) -> str:
        """One of "pass", "skip", "fail STATUS", "too long" and "host died"."""
        if self.host_died:
            return "host died"
        if self.status is None:
            return "too long"
        return {0: "pass", _SKIPPED: "skip"}.get(self.status, f"fail {self.status}")

    @property
    def reason(self) -> str:
        """Reason for not passing, in one line; empty if it passed or gave none."""
        if self.host_died:
            return self.host_died
        if self.status == _SKIPPED:
            said = re.findall(r"# SKIP[ -]*(?:Requirement not met: )?(.+)", self.output)
        elif self.status:
            said = re.findall(r"^  ([^ :]+\.c:\d+): ", self.output, re.MULTILINE)  # TEST_ASSERT
            said += self.output.splitlines()[-1:]
        else:
            return ""
        return ": ".join(" ".join(line.split()) for line in said)


@dataclass(frozen=True)
class Comparison:
    """One selftest on both sides."""

    name: str
    stock: Result
    patched: Result

    @property
    def same(self) -> bool:
        """True if the patch made no difference."""
        return not list(self.differences())

    @property
    def conclusive(self) -> bool:
        """True if the selftest ran to its end on both sides."""
        return not any(r.host_died or r.status is None for r in (self.stock, self.patched))

    def differences(self) -> Iterator[str]:
        """Yield the differences between the sides, line by line; none if they are the same."""
        if self.stock.verdict != self.patched.verdict:
            yield f"ended with: {self.stock.verdict}, patched: {self.patched.verdict}"
        elif not self.conclusive:
            return  # the time limit stopped it at an arbitrary point
        stock, patched = (
            [*_stable(result.output.splitlines()), *_stable(result.log)]
            for result in (self.stock, self.patched)
        )
        yield from difflib.unified_diff(stock, patched, "stock", "patched", n=0, lineterm="")


def compare(
    names: Sequence[str], stock: Mapping[str, Result], patched: Mapping[str, Result]
) -> list[Comparison]:
    """Pair the results of both sides by name.

    Args:
        names: selftests to compare, in order; those without a result on both sides are left out.
        stock: results with the unpatched modules, by name.
        patched: results with the patched modules, by name.
    """
    both = [name for name in names if name in stock and name in patched]
    return [Comparison(name, stock[name], patched[name]) for name in both]


def choose(available: Sequence[str], patterns: Sequence[str], *, slow: bool = False) -> list[str]:
    """Return the names of the selftests to run.

    Args:
        available: names of all selftests that were built.
        patterns: names, with or without their directory, or shell patterns. Without any, all
            selftests are chosen, except those in `EXCLUDED` and, unless `slow` is set, in `SLOW`.
        slow: whether to include `SLOW` when there are no patterns.

    Raises:
        SelftestUnknownError: a pattern matches no name.
    """
    if not patterns:
        left_out = {*EXCLUDED, *({} if slow else SLOW)}
        return [name for name in available if name not in left_out]
    chosen = []
    for pattern in patterns:
        fitting = [n for n in available if fnmatch(n, pattern) or fnmatch(Path(n).name, pattern)]
        if not fitting:
            raise SelftestUnknownError(
                f"no selftest is called {pattern}",
                f"list their names: {program()} kernel selftests --list",
            )
        chosen += fitting
    return sorted(set(chosen))


def parse(output: bytes) -> tuple[dict[str, Result], str]:
    """Decode the output of the runner on the emulated host (``inside/selftest_runner.py``).

    Returns:
        The results by name, and the name of the selftest that did not end; "" if all did.
    """
    results: dict[str, Result] = {}
    running = ""
    # If the host died, the last line is incomplete.
    for line in output.decode(errors="replace").split("\n")[:-1]:
        record = json.loads(line)
        if "start" in record:
            running = record["start"]
        else:
            fields = (record[key] for key in ("status", "seconds", "output", "log"))
            results[record["name"]] = Result(*fields)
            running = ""
    return results, running


class Selftests:
    """The selftests of one kernel series, and the emulated host that runs them.

    Attributes:
        names: names of all selftests that were built, such as `x86_64/cpuid_test`.
        release: release of the emulated host's kernel, as `uname -r` prints it.
    """

    def __init__(self, series: str | None = None) -> None:
        """Build the selftests if the cache lacks them.

        Args:
            series: kernel series, one of `pykvm.kernel.series.SERIES`; by default that of
                `default_series()`.

        Raises:
            PykvmError: they cannot be built; the message says why.
        """
        host = newest_kernel(series)
        self._series = host.series
        self.release = host.release
        self._cancelled = threading.Event()
        self._built = kernel_selftests.build(find_source(host.series, packages_directory(host)))
        self.names = kernel_selftests.programs(self._built)

    def compare(
        self,
        names: Sequence[str],
        *,
        limit: float = LIMIT,
        distribution: bool = False,
        report: Callable[[Comparison], None] | None = None,
    ) -> list[Comparison]:
        """Run selftests on two emulated hosts at the same time, one for each side.

        Args:
            names: selftests to run.
            limit: seconds of the emulated clock for each selftest.
            distribution: whether to compare with the distribution's modules instead of unpatched
                ones.
            report: called with each comparison as soon as both sides have a result, in the order
                of `names`.

        Raises:
            PykvmError: the modules cannot be built, or the emulated host cannot be started.
        """
        self._cancelled.clear()
        unpatched = None if distribution else kernel.build(self.release, patched=False)
        sides = (unpatched, kernel.build(self.release))
        found: tuple[dict[str, Result], dict[str, Result]] = ({}, {})
        done: list[Comparison] = []
        with ThreadPoolExecutor(len(sides)) as pool, tempfile.TemporaryDirectory() as directory:
            programs = self._lay_out(Path(directory))
            try:
                for start in range(0, len(names), _BATCH):
                    batch = names[start : start + _BATCH]
                    runs = [pool.submit(self._run, programs, batch, kvm, limit) for kvm in sides]
                    for results, run in zip(found, runs, strict=True):
                        results.update(run.result())
                    for each in compare(batch, *found):
                        done.append(each)
                        if report is not None:
                            report(each)
            finally:
                # Ctrl-C interrupts this thread only; the pool waits for the others.
                self._cancelled.set()
        return done

    def _lay_out(self, directory: Path) -> Path:
        """Copy the programs and their runner into `directory`; return the folder to carry in."""
        programs = directory / "selftests"
        shutil.copytree(self._built, programs)
        shutil.copy2(_RUNNER, programs)
        return programs

    def _run(
        self, programs: Path, names: Sequence[str], modules: Path | None, limit: float
    ) -> dict[str, Result]:
        """Run `names` on a host with `modules`, or with the distribution's modules if None.

        A host that dies is started again for the selftests that have no result yet.
        """
        testbed = Testbed(programs, series=self._series)
        results: dict[str, Result] = {}
        while left := [name for name in names if name not in results]:
            commands = [f"{name} {_ARGUMENTS.get(name, '')}".strip() for name in left]
            output = bytearray()
            reason = "the runner ended early"
            try:
                testbed.run(
                    ["python3", _RUNNER.name, str(limit), *commands],
                    kvm="stock" if modules is None else "payload",
                    modules=modules,
                    timeout=60 + len(left) * (limit + _SECONDS_FOR_EACH),
                    stdout=output.extend,
                    cancelled=self._cancelled,
                )
            except (HostDiedError, CommandTimeoutError) as error:
                reason = str(error)
            finished, running = parse(bytes(output))
            results.update(finished)
            if len(results) < len(names):
                # If none was running, the host did not start. Give up one name each time, so
                # that the loop ends.
                lost = running or next(name for name in left if name not in finished)
                results[lost] = Result(None, host_died=reason)
        return results


def _stable(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines with their numbers replaced, since those may differ from run to run."""
    for line in lines:
        yield re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+", "#", line)
