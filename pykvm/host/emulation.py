"""Whether this machine is the emulated host, where counts are exact and times mean nothing."""

import os

__all__ = ["host_kind", "is_emulated"]


def is_emulated() -> bool:
    """Whether this is the emulated host: the testbed sets PYKVM_TESTBED=1 for what it runs."""
    return bool(os.environ.get("PYKVM_TESTBED"))


def host_kind() -> str:
    """`emulated` or `hardware`, as records have it."""
    return "emulated" if is_emulated() else "hardware"
