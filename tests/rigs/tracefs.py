"""The kernel's tracing directory (Documentation/trace/ftrace.rst)."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

TRACING: Final = Path("/sys/kernel/tracing")
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8  # of mount(2)


def mount_tracefs() -> None:
    """Where the host has not done it. Skips the test on a kernel that has none."""
    if (TRACING / "trace").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_NOSUID_NODEV_NOEXEC)
    done = libc.mount(b"tracefs", os.fsencode(TRACING), b"tracefs", flags, 0)
    if done and not (TRACING / "trace").exists():
        pytest.skip(f"this kernel has no tracefs: {os.strerror(ctypes.get_errno())}")


@contextmanager
def kprobes(*probes: str) -> Iterator[list[str]]:
    """The lines that these dynamic tracepoints wrote, filled at the end.

    probes: Documentation/trace/kprobetrace.rst, all of the group `pykvm`: "p:pykvm/NAME FUNCTION".
    """
    lines: list[str] = []
    enable = TRACING / "events" / "pykvm" / "enable"
    mount_tracefs()
    _change_probes(*probes)
    try:
        (TRACING / "trace").write_text("")
        enable.write_text("1")
        try:
            yield lines
        finally:
            enable.write_text("0")
        lines += (TRACING / "trace").read_text().splitlines()
    finally:
        _change_probes(*(f"-:{probe.split()[0].removeprefix('p:')}" for probe in probes))


def _change_probes(*lines: str) -> None:
    file = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)  # or all others go
    try:
        for line in lines:
            os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
