"""Processor features that only some tests need: `pytest.mark.processor("LA57")`."""

import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pykvm.host.processor import MsrUnreadableError, read_msr, read_processor

_CR4_FIXED1: Final = 0x489  # IA32_VMX_CR4_FIXED1, SDM vol. 3D A.8: the bits that may be set
_APICV: Final = Path("/sys/module/kvm_intel/parameters/enable_apicv")

CR4_BITS: Final = {"LA57": 12, "PKE": 22, "CET": 23, "PKS": 24, "UINTR": 25}
"""Bits of CR4 that only some processors with VMFUNC have, by name."""

APICV: Final = "APICv"
"""Virtual interrupt delivery and posted interrupts, which KVM uses together."""


def missing(features: Iterable[str]) -> str:
    """Return why tests that need all of `features` cannot run here; empty if they can."""
    for feature in features:
        if feature == APICV:
            there = _APICV.exists() and _APICV.read_text().strip() == "Y"
        else:
            try:
                there = bool(_settable_in_cr4() >> CR4_BITS[feature] & 1)
            except MsrUnreadableError as error:
                return str(error)
        if not there:
            return f"this processor has no {feature}"
    return ""


def host_levels() -> int:
    """Return the number of paging levels that the host uses.

    Bochs 3.0 enters no guest with another number: it mistakes the change of CR4.LA57 for one that
    the guest makes in 64-bit mode, and panics.
    """
    return 5 if "la57" in read_processor().flags else 4


@functools.cache
def _settable_in_cr4() -> int:
    subprocess.run(["modprobe", "msr"], capture_output=True, check=False)
    return read_msr(_CR4_FIXED1)
