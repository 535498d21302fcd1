"""Protections of the crossing that a test build can leave out.

A build without one of them has two uses: to measure its cost (``pykvm bench protections``), and as
the control of a test, in which the attack that it stops succeeds::

    nop = SharedObject("nop", "nop.c", without={Protection.GATE_BARRIER})

For any other purpose an object has all of them. Two more are for processors with weaknesses that a
guest could use against objects (`FOR_WEAK_PROCESSORS`): an object has them where they are needed.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Final

from pykvm.kernel import weaknesses
from pykvm.kernel.weaknesses import Weak

__all__ = [
    "ALL",
    "FOR_WEAK_PROCESSORS",
    "NOTHING_EXTRA",
    "Extra",
    "Protection",
    "Without",
    "answers",
    "defines",
    "needed",
]


class Protection(Enum):
    """A protection; its value is the macro that leaves it out, or empty for a toolchain's check.

    For those in `FOR_WEAK_PROCESSORS` it is the macro that adds it, empty for compiler options.
    """

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
    BUFFER_CLEARING = "ELISA_BUFFER_CLEARING"
    """VERW before the return: the processor's buffers hold nothing of the object's (T38)."""
    RETURN_THUNKS = "ELISA_RETURN_THUNKS"
    """Returns of an object that go where their call says, also in speculation (T38)."""
    CODE_CHECK = ""
    """The toolchain's checks of the object's instructions (`pykvm.elisa.object_code`, T14, T23) and
    masked indices (`pykvm.elisa.masked_indices`, T39)."""


Without = frozenset[Protection]
Extra = frozenset[Protection]

ALL: Without = frozenset()
"""No protection left out."""

NOTHING_EXTRA: Extra = frozenset()
"""Nothing for weak processors."""

FOR_WEAK_PROCESSORS: Final = {
    Protection.BUFFER_CLEARING: Weak.BUFFERS,
    Protection.RETURN_THUNKS: Weak.RETURNS,
}
"""Protections that only weak processors need, with the weakness that each answers."""


def needed() -> Extra:
    """Return what objects need on this processor, for weaknesses that nobody has accepted."""
    left = weaknesses.unaccepted()
    return frozenset(one for one, weak in FOR_WEAK_PROCESSORS.items() if weak & left)


def answers(extra: Iterable[Protection]) -> Weak:
    """Return the weaknesses that objects with these protections answer."""
    return Weak(sum(FOR_WEAK_PROCESSORS[one] for one in extra))


def defines(without: Iterable[Protection], extra: Iterable[Protection]) -> dict[str, str | int]:
    """Return the macros that leave protections out or add them, for the compiler.

    Raises:
        ValueError: a protection for weak processors is left out, or another one added.
    """
    out, added = set(without), set(extra)
    wrong = (out & FOR_WEAK_PROCESSORS.keys()) | (added - FOR_WEAK_PROCESSORS.keys())
    if wrong:
        names = ", ".join(sorted(one.name for one in wrong))
        raise ValueError(f"{names}: leave out what all objects have, add what some processors need")
    return {name: 1 for name in sorted(one.value for one in out | added) if name}
