"""The kind of this machine: on an emulated host, counts of instructions replace times."""

import os

__all__ = ["counts_exactly", "host_kind", "is_emulated"]


def is_emulated() -> bool:
    """Return whether this is the emulated host, where the testbed sets PYKVM_TESTBED."""
    return bool(os.environ.get("PYKVM_TESTBED"))


def counts_exactly() -> bool:
    """Return whether this is an emulated host that counts every instruction."""
    return os.environ.get("PYKVM_TESTBED") == "exact"


def host_kind() -> str:
    """Return "emulated" or "hardware", as records have it."""
    return "emulated" if is_emulated() else "hardware"
