"""Defences of the kernel taken away while a control runs: modules built with weaken.patch.

Only a test build has the parameter: ``pykvm testbed --also tests/attacks/weaken.patch``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path
from typing import Final

PATCH: Final = Path("tests") / "attacks" / "weaken.patch"
PARAMETER: Final = Path("/sys/module/kvm_intel/parameters/elisa_weaken")


class Weaken(IntFlag):
    """What weaken.patch can take away, bit by bit as it has them."""

    MODE = 0x001  # I5: VM functions stay on in any mode
    TABLES = 0x002  # I8: descriptor tables are not looked at
    EVENTS = 0x004  # I6: interrupts, NMIs and exceptions are injected wherever the vCPU is
    EXITS = 0x008  # I7: exits from outside are handled as if from the default context
    INIT = 0x010  # I6: INIT, SIPI and SMI do not wait
    FEATURES = 0x020  # T17, T18, T27: CPUID, CR4 and MSRs are not filtered
    LIMITS = 0x040  # T21: neither the VM's limits nor RLIMIT_MEMLOCK
    INVEPT = 0x080  # I9: no INVEPT when a slot is emptied or a context goes
    IPAT = 0x100  # T26: leaves take the memory type that the VMM wrote
    LIST = 0x200  # T28: a gate made for another vCPU is accepted
    OWNER = 0x400  # T25: a context of another VM is accepted
    APICV = 0x800  # I6: the processor delivers interrupts by itself
    CR4 = 0x1000  # T18: CET, PKS and UINTR, which KVM knows nothing of, are the guest's to turn on


class NotWeakenedError(Exception):
    """The loaded modules keep all their defences."""


@contextmanager
def weakened(bits: Weaken) -> Iterator[None]:
    """Take `bits` away for as long as this lasts. Raises NotWeakenedError on ordinary modules."""
    if not PARAMETER.exists():
        raise NotWeakenedError(
            f"kvm_intel has no parameter {PARAMETER.name}; "
            f"run: pykvm testbed --also {PATCH} -- python -m pytest -m weakened"
        )
    PARAMETER.write_text(str(int(bits)))
    try:
        assert int(PARAMETER.read_text()) == bits
        yield
    finally:
        PARAMETER.write_text("0")
