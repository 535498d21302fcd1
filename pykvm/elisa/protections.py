"""Protections that a test build of the crossing can leave out, and what each is for.

A build without one is for two things only: to measure what it costs (`pykvm bench protections`),
and as the control of a test, in which the attack that the protection stops succeeds::

    nop = SharedObject("nop", "nop.c", without={Protection.GATE_BARRIER})

What a guest attaches to for any other purpose has all of them.
"""

from collections.abc import Iterable
from enum import Enum

__all__ = ["ALL", "Protection", "Without", "defines_without"]


class Protection(Enum):
    """The value is the macro that leaves it out, and empty for what the toolchain checks."""

    GATE_BARRIER = "ELISA_NO_GATE_BARRIER"
    """LFENCE behind the gate's check: no speculation past it (T23)."""
    GATE_CHECK = "ELISA_NO_GATE_CHECK"
    """The gate's comparison of what the slot holds with the official EPTP (I2, T3)."""
    SLOT_CLEARING = "ELISA_NO_SLOT_CLEARING"
    """Emptying the transient slot on arrival in the sub context (I1, T1)."""
    WINDOW_ACCESS = "ELISA_NO_WINDOW_ACCESS"
    """STAC and CLAC: windows are user pages to callers in kernel mode (I8, second layer). An
    object without it cannot touch windows and shared memory while CR4.SMAP is on."""
    FLAG_CLEARING = "ELISA_NO_FLAG_CLEARING"
    """Clearing RFLAGS.AC for callers in user mode (T10, T14)."""
    REGISTER_CLEARING = "ELISA_NO_REGISTER_CLEARING"
    """Clearing the registers that a call may have used before the return (T15)."""
    CODE_CHECK = ""
    """The toolchain's look at the object's instructions (`pykvm.elisa.object_code`)."""


Without = frozenset[Protection]

ALL: Without = frozenset()
"""Nothing left out."""


def defines_without(without: Iterable[Protection]) -> dict[str, str | int]:
    """Macros for the compiler."""
    return {name: 1 for name in sorted(protection.value for protection in without) if name}
