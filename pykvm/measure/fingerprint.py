"""Fingerprint of the machine, stored in each record of a measurement.

It names hardware and versions, on which the figures depend, but no host, user or path.
"""

import os
from typing import Any

from pykvm.host.checkout import commit
from pykvm.host.emulation import host_kind
from pykvm.host.processor import read_processor
from pykvm.kernel import modules
from pykvm.kernel import packages as kernel_packages
from pykvm.version import version

__all__ = ["fingerprint"]


def fingerprint() -> dict[str, Any]:
    """Return the fingerprint of this machine as JSON values."""
    processor = read_processor()
    kvm = modules.status()
    return {
        "host": host_kind(),
        "cpu": processor.name,
        "cpu_vendor": processor.vendor,
        "cpu_signature": f"{processor.family}-{processor.model}-{processor.stepping}",
        "cpu_microcode": processor.microcode,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": kernel_packages.running_release(),
        "kvm": kvm.state,
        "kvm_elisa": kvm.elisa,
        "kvm_srcversion": kvm.srcversion,
        "pykvm": version(),
        "commit": commit(),
    }
