"""The kind of this machine: on the emulated host counts are exact and times mean nothing."""

import os

__all__ = ["host_kind", "is_emulated"]


def is_emulated() -> bool:
    """Return whether this is the emulated host, where the testbed sets PYKVM_TESTBED=1."""
    return bool(os.environ.get("PYKVM_TESTBED"))


def host_kind() -> str:
    """Return "emulated" or "hardware", as records have it."""
    return "emulated" if is_emulated() else "hardware"
