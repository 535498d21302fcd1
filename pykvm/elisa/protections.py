"""Protections of the crossing that a test build can leave out.

A build without one of them has two uses: to measure its cost (``pykvm bench protections``), and as
the control of a test, in which the attack that it stops succeeds::

    nop = SharedObject("nop", "nop.c", without={Protection.GATE_BARRIER})

For any other purpose an object has all of them.
"""

from collections.abc import Iterable
from enum import Enum

__all__ = ["ALL", "Protection", "Without", "defines_without"]


class Protection(Enum):
    """A protection; its value is the macro that leaves it out, or empty for a toolchain's check."""

    GATE_BARRIER = "ELISA_NO_GATE_BARRIER"
    """LFENCE after the gate's check: no speculation past it (T23)."""
    GATE_CHECK = "ELISA_NO_GATE_CHECK"
    """The gate's comparison of the slot with the official EPTP (I2, T3)."""
    SLOT_CLEARING = "ELISA_NO_SLOT_CLEARING"
    """Emptying the transient slot on arrival in the sub context (I1, T1)."""
    WINDOW_ACCESS = "ELISA_NO_WINDOW_ACCESS"
    """STAC and CLAC, because windows are user pages for callers in kernel mode too (I8, second
    layer). Without them an object cannot access windows and shared memory while CR4.SMAP is on."""
    FLAG_CLEARING = "ELISA_NO_FLAG_CLEARING"
    """Clearing RFLAGS.AC for callers in user mode (T10, T14)."""
    REGISTER_CLEARING = "ELISA_NO_REGISTER_CLEARING"
    """Clearing, before the return, the registers that a call may have used (T15)."""
    CODE_CHECK = ""
    """The toolchain's checks of the object's instructions (`pykvm.elisa.object_code`, T14, T23) and
    masked indices (`pykvm.elisa.masked_indices`, T38)."""


Without = frozenset[Protection]

ALL: Without = frozenset()
"""No protection left out."""


def defines_without(without: Iterable[Protection]) -> dict[str, str | int]:
    """Return the macros that leave protections out, for the compiler."""
    return {name: 1 for name in sorted(protection.value for protection in without) if name}
