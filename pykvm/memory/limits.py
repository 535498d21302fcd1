"""Limits of the host for a process: memory, huge pages and pinned memory.

Sources: proc(5), getrlimit(2), Linux Documentation/admin-guide/mm/hugetlbpage.rst.
"""

import resource
from pathlib import Path
from typing import Final

from pykvm.errors import PykvmError

__all__ = [
    "HugePagesError",
    "LockLimitError",
    "MemoryTooSmallError",
    "huge_pages_error",
    "lockable_bytes",
    "require_lockable",
    "require_memory",
]

_CAP_IPC_LOCK: Final = 14  # linux/capability.h


class MemoryTooSmallError(PykvmError, MemoryError):
    """Less memory in the machine than the guest needs."""


class HugePagesError(PykvmError, MemoryError):
    """A pool of huge pages that is too small, or a page size that is not supported."""


class LockLimitError(PykvmError, MemoryError):
    """A limit (RLIMIT_MEMLOCK) too low for the pages that the kernel has to pin."""


def lockable_bytes() -> int | None:
    """Return how many bytes this process may pin.

    Returns:
        RLIMIT_MEMLOCK, or None if it does not limit this process: it is unlimited, or the process
        has CAP_IPC_LOCK.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "CapEff" and int(value, 16) >> _CAP_IPC_LOCK & 1:
            return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def require_lockable(size: int) -> None:
    """Check that this process may pin `size` bytes.

    Raises:
        LockLimitError: it may not.
    """
    limit = lockable_bytes()
    if limit is not None and limit < size:
        raise LockLimitError(
            f"{_kib(size)} KiB have to be pinned and only {limit >> 10} KiB may be",
            f"type `ulimit -l {_kib(size)}` in a root shell, or run as root",
        )


def require_memory(size: int, key: str) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key and size > int(value.split()[0]) << 10:
            raise MemoryTooSmallError(
                f"{_kib(size) >> 10} MiB of guest memory do not fit into "
                f"{int(value.split()[0]) >> 10} MiB ({key})",
                "give the guest less",
            )


def huge_pages_error(page_size: int, size: int) -> HugePagesError:
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    need = size // page_size
    try:
        total = int((pool / "nr_hugepages").read_text())
        free = int((pool / "free_hugepages").read_text())
        free -= int((pool / "resv_hugepages").read_text())
    except OSError:
        return HugePagesError(
            f"this kernel has no pool of {page_size >> 20} MiB pages", "leave out huge_page"
        )
    # /proc/sys/vm/nr_hugepages is the pool of the default size, 2 MiB unless configured otherwise.
    default = f"Hugepagesize:{page_size >> 10:>15} kB"
    short = default.split() in [
        line.split() for line in Path("/proc/meminfo").read_text().splitlines()
    ]
    where = Path("/proc/sys/vm/nr_hugepages") if short else pool / "nr_hugepages"
    return HugePagesError(
        f"{need} huge pages of {page_size >> 20} MiB are needed and {free} are free",
        f"type `echo {total + need - free} > {where}` as root",
    )


def _kib(size: int) -> int:
    return -(-size >> 10)
