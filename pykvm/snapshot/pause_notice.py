"""Tells guests that they were away."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from pykvm.kvm import IoctlError, Vcpu

__all__ = ["tell_of_pause"]


def tell_of_pause(vcpus: Sequence[Vcpu]) -> None:
    """Tell a guest that uses kvmclock that it was paused, so that its watchdogs do not bite.

    Source: Documentation/virt/kvm/api.rst 4.57 (KVM_KVMCLOCK_CTRL).
    """
    for vcpu in vcpus:
        if not vcpu.check_extension("KVM_CAP_KVMCLOCK_CTRL"):
            return
        try:
            vcpu.kvmclock_ctrl()
        except IoctlError as error:
            if error.errno != errno.EINVAL:  # the guest does not use kvmclock
                raise
