"""The kernel's tracing directory (Documentation/trace/ftrace.rst)."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

TRACING: Final = Path("/sys/kernel/tracing")
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8  # flags of mount(2)


def mount_tracefs() -> None:
    """Mount tracefs if the host has not done so; skip the test on a kernel without it."""
    if (TRACING / "trace").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_NOSUID_NODEV_NOEXEC)
    done = libc.mount(b"tracefs", os.fsencode(TRACING), b"tracefs", flags, 0)
    if done and not (TRACING / "trace").exists():
        pytest.skip(f"this kernel has no tracefs: {os.strerror(ctypes.get_errno())}")


@contextmanager
def kprobes(*probes: str) -> Iterator[list[str]]:
    """Yield a list that holds the lines of dynamic tracepoints after the end of the context.

    Args:
        probes: as in Documentation/trace/kprobetrace.rst, all of the group `pykvm`: "p:pykvm/NAME
            FUNCTION".
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
    file = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)  # keeps the other probes
    try:
        for line in lines:
            os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
