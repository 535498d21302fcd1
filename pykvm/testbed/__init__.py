"""The emulated Intel host: Bochs boots a Linux that runs pykvm on a KVM with VMFUNC.

    from pykvm.testbed import Testbed

    outcome = Testbed().run(["python3", "-m", "pytest", "tests/elisa"], timeout=300)
    assert outcome.status == 0

Every process on the emulated host has `PYKVM_TESTBED` in its environment.
"""

from pykvm.testbed.kernel_image import KernelImageError
from pykvm.testbed.session import (
    CancelledError,
    CommandTimeoutError,
    HostDiedError,
    Outcome,
    Testbed,
)

__all__ = [
    "CancelledError",
    "CommandTimeoutError",
    "HostDiedError",
    "KernelImageError",
    "Outcome",
    "Testbed",
]
