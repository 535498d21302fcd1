"""Switch off single defences of the kernel while a control runs (modules with weaken.patch).

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
    """Defences that weaken.patch can switch off; the bits are the patch's."""

    MODE = 0x001  # I5: VM functions stay enabled in any mode
    TABLES = 0x002  # I8: descriptor tables are not checked
    EVENTS = 0x004  # I6: interrupts, NMIs and exceptions are injected in any context
    EXITS = 0x008  # I7: exits from outside are handled as if from the default context
    INIT = 0x010  # I6: INIT, SIPI and SMI do not wait
    FEATURES = 0x020  # T17, T18, T27: CPUID, CR4 and MSRs are not filtered
    LIMITS = 0x040  # T21: neither the VM's limits nor RLIMIT_MEMLOCK hold
    INVEPT = 0x080  # I9: no INVEPT when a slot is emptied or a context is freed
    IPAT = 0x100  # T26: leaves take the memory type that the VMM wrote
    LIST = 0x200  # T28: a gate made for another vCPU is accepted
    OWNER = 0x400  # T25: a context of another VM is accepted
    APICV = 0x800  # I6: the processor delivers interrupts by itself
    CR4 = 0x1000  # T18: the guest may enable CET, PKS and UINTR, unknown to KVM
    HOME = 0x2000  # T31: the transient slot is not cleared when a vCPU is taken home
    LEFT = 0x4000  # T32: a vCPU that is taken home keeps what trusted code had in it
    STATE = 0x8000  # T33: the VMM may set the state of a vCPU that is in a context
    EJECT = 0x10000  # T29: what a process does wrong goes to the VMM
    PARTS = 0x20000  # T36: registered memory is executable
    PROCESSOR = 0x40000  # T38: contexts on any processor


class NotWeakenedError(Exception):
    """The loaded modules have no switch for their defences."""


@contextmanager
def weakened(bits: Weaken) -> Iterator[None]:
    """Switch off the defences `bits` for the duration of the context.

    Raises:
        NotWeakenedError: the modules are no test build.
    """
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
