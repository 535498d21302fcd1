"""What a test needs of this host's KVM: it is skipped, by name, where that is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.kvm import CapabilityMissingError
from pykvm.kvm.handle import Handle


def need(handle: Handle, capability: str) -> int:
    """The capability's value; skips the test, by name, where it is 0."""
    value = handle.check_extension(capability)
    if not value:
        pytest.skip(f"this kvm has no {capability}")
    return value


def refused_without(handle: Handle, capability: str, call: Callable[[], object]) -> bool:
    """Where the capability is 0, checks that the call says so; True then."""
    if handle.check_extension(capability):
        return False
    with pytest.raises(CapabilityMissingError, match=capability):
        call()
    return True


def need_hardware(what: str) -> None:
    """Skips, by name, where KVM interprets guests in software and leaves `what` out."""
    if not any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")):
        pytest.skip(f"neither kvm_intel nor kvm_amd is loaded: no {what}")
