"""Resources that the host holds for KVM and its contexts, none of which may leak."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pykvm.kvm import Kvm
from pykvm.kvm.stats import Stats
from tests.rigs.context_requests import raw

# Lines of the kernel's log that no test may cause.
_TROUBLE = re.compile(
    r"WARNING:|BUG|Oops|general protection|Call Trace|stall|[Bb]ad page|invept|vmwrite|vmread"
)


@dataclass(frozen=True)
class HostState:
    """Resources held at one moment.

    Attributes:
        locked: KiB charged to this process.
        pinned: pages pinned in the whole machine.
        module_users: references to the module, one for each VM.
        files: open files of this process.
    """

    locked: int
    pinned: int
    module_users: int
    files: int


def locked_kib() -> int:
    """Return VmLck of this process in KiB; the patch charges its pages there."""
    match = re.search(r"VmLck:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1])


def pinned_pages() -> int:
    """Return the pages pinned in the whole machine (Documentation/core-api/pin_user_pages.rst)."""
    Path("/proc/sys/vm/stat_refresh").write_text("1")  # sum up the counters of all CPUs
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts["nr_foll_pin_acquired"]) - int(counts["nr_foll_pin_released"])


def host_state() -> HostState:
    return HostState(
        locked_kib(),
        pinned_pages(),
        int(Path("/sys/module/kvm_intel/refcnt").read_text()),
        len(os.listdir("/proc/self/fd")),
    )


@contextmanager
def nothing_stays() -> Iterator[HostState]:
    """Yield the state before the test; fail if it differs afterwards."""
    gc.collect()  # collect garbage of earlier tests now, not during this one
    before = host_state()
    yield before
    after = host_state()
    assert after == before, f"{before} before, {after} after"


@contextmanager
def quiet_kernel() -> Iterator[None]:
    """Fail if the kernel's log holds new trouble at the end."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield
        trouble = []
        while True:
            try:
                line = os.read(log, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                break
            if _TROUBLE.search(line):
                trouble.append(line)
        assert trouble == []
    finally:
        os.close(log)


class VmStatistics:
    """Reader of elisa_contexts and elisa_pages of any VM; it parses the descriptions once."""

    def __init__(self, kvm: Kvm) -> None:
        with kvm.create_vm() as vm, vm.stats() as stats:
            self._offsets = [self._offset(stats, f"elisa_{name}") for name in ("contexts", "pages")]

    @staticmethod
    def _offset(stats: Stats, name: str) -> int:
        (found,) = [each.offset for each in stats.statistics if each.name == name]
        return stats._data_offset + found

    def read(self, vm: int) -> list[int]:
        fd = raw(vm, "KVM_GET_STATS_FD")
        assert fd >= 0
        try:
            return [int.from_bytes(os.pread(fd, 8, offset), "little") for offset in self._offsets]
        finally:
            os.close(fd)
