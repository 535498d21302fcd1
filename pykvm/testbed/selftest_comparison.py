"""KVM's own selftests on the emulated host, with the unpatched and with the patched modules.

Both sides are built by one recipe from one source, so the patch is all that differs between them;
the distribution's own modules differ in their compiler's options too, and can be chosen instead.
A selftest is the same on both sides if it ends in the same way, prints the same and makes the
kernel complain about the same; numbers, which tell times and addresses, are left out of that.
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

# Seconds of the emulated clock that one selftest may take, each being 45 million instructions.
LIMIT = 30.0

# Those that take more than a few seconds each; run when all are asked for, or by name.
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

# Those that say nothing here: name and reason.
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

# Arguments for those that want more memory, vCPUs or iterations than the emulated host has.
_ARGUMENTS: Mapping[str, str] = {
    "demand_paging_test": "-b 16M",
    "dirty_log_perf_test": "-b 16M",
    "kvm_page_table_test": "-b 16M",
}

_SKIPPED = 4  # exit status by which a selftest says that it cannot run here
_RUNNER = Path(__file__).with_name("inside") / "selftest_runner.py"

# A host that stops takes the rest of its batch along, and is waited for as long as all may take.
_BATCH = 12
_SECONDS_FOR_EACH = 10.0


class SelftestUnknownError(PykvmError):
    """No selftest of this series has such a name."""


@dataclass(frozen=True)
class Result:
    """How one selftest ended.

    Attributes:
        status: exit status; None if it was ended for taking too long.
        seconds: of the emulated clock.
        output: what it printed.
        log: the kernel's warnings meanwhile.
        host_died: why the emulated host ended during the test; empty if it did not.
    """

    status: int | None
    seconds: float = 0.0
    output: str = ""
    log: list[str] = field(default_factory=list)
    host_died: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two: pass, skip, fail 254, too long, host died."""
        if self.host_died:
            return "host died"
        if self.status is None:
            return "too long"
        return {0: "pass", _SKIPPED: "skip"}.get(self.status, f"fail {self.status}")

    @property
    def reason(self) -> str:
        """What it says about not having passed, in one line; empty if it passed or says nothing."""
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
        """Whether the patch made no difference."""
        return not list(self.differences())

    @property
    def conclusive(self) -> bool:
        """Whether both sides ran it to its end."""
        return not any(r.host_died or r.status is None for r in (self.stock, self.patched))

    def differences(self) -> Iterator[str]:
        """What differs, a line each; nothing if both sides did the same."""
        if self.stock.verdict != self.patched.verdict:
            yield f"ended with: {self.stock.verdict}, patched: {self.patched.verdict}"
        elif not self.conclusive:
            return  # where it was stopped is chance
        stock, patched = (
            [*_stable(result.output.splitlines()), *_stable(result.log)]
            for result in (self.stock, self.patched)
        )
        yield from difflib.unified_diff(stock, patched, "stock", "patched", n=0, lineterm="")


def compare(
    names: Sequence[str], stock: Mapping[str, Result], patched: Mapping[str, Result]
) -> list[Comparison]:
    """Put the results of both sides beside each other; `names` without a result are left out."""
    both = [name for name in names if name in stock and name in patched]
    return [Comparison(name, stock[name], patched[name]) for name in both]


def choose(available: Sequence[str], patterns: Sequence[str], *, slow: bool = False) -> list[str]:
    """The selftests to run.

    Args:
        available: All that were built.
        patterns: Names, with or without their directory, or shell patterns. If there are none:
            all but those that say nothing here, and but the slow ones unless `slow`.

    Raises:
        SelftestUnknownError: a pattern fits no name.
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
    """What the runner said: results by name, and the name of the test that did not end, or ""."""
    results: dict[str, Result] = {}
    running = ""
    # A host that dies leaves half a line.
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
    """The selftests of one kernel series, and the emulated host that they run on.

    Attributes:
        names: all that were built, `x86_64/cpuid_test` and so on.
        release: of the emulated host's kernel, as `uname -r` says it.
    """

    def __init__(self, series: str | None = None) -> None:
        """Build the selftests of `series`, if the cache lacks them.

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
        """Run `names` on both sides, at the same time on two hosts.

        Args:
            limit: seconds of the emulated clock for each.
            distribution: compare with the distribution's modules, not with unpatched ones.
            report: told each comparison as soon as both sides have it, in the order of `names`.

        Raises:
            PykvmError: the modules or the emulated host cannot be had.
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
                self._cancelled.set()  # Ctrl-C reaches this thread only, and the pool waits
        return done

    def _lay_out(self, directory: Path) -> Path:
        """What the emulated host sees: the programs and their runner."""
        programs = directory / "selftests"
        shutil.copytree(self._built, programs)
        shutil.copy2(_RUNNER, programs)
        return programs

    def _run(
        self, programs: Path, names: Sequence[str], modules: Path | None, limit: float
    ) -> dict[str, Result]:
        """Run `names` with `modules`, or with the distribution's if None."""
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
                # Without one that was running, the host could not even start: do not try forever.
                lost = running or next(name for name in left if name not in finished)
                results[lost] = Result(None, host_died=reason)
        return results


def _stable(lines: Sequence[str]) -> Iterator[str]:
    """Lines without what may change from run to run: numbers, of any base."""
    for line in lines:
        yield re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+", "#", line)
