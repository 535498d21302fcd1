"""The kernel's tracing directory (Documentation/trace/ftrace.rst)."""

import ctypes
import os
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
