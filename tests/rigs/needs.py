"""Requirements of tests on this host's KVM; a skip names what is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.kvm import CapabilityMissingError
from pykvm.kvm.handle import Handle


def need(handle: Handle, capability: str) -> int:
    """Return the capability's value; skip the test, naming the capability, if it is 0."""
    value = handle.check_extension(capability)
    if not value:
        pytest.skip(f"this kvm has no {capability}")
    return value


def refused_without(handle: Handle, capability: str, call: Callable[[], object]) -> bool:
    """Check that the call reports the missing capability; return whether it is missing."""
    if handle.check_extension(capability):
        return False
    with pytest.raises(CapabilityMissingError, match=capability):
        call()
    return True


def need_hardware(what: str) -> None:
    """Skip the test, naming `what`, if KVM interprets guests in software and lacks it."""
    if not any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")):
        pytest.skip(f"neither kvm_intel nor kvm_amd is loaded: no {what}")
