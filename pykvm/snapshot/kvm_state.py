"""KVM's state of a paused machine: its VM and its vCPUs, as values for JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from pykvm.errors import PykvmError
from pykvm.kvm import Vcpu, Vm
from pykvm.snapshot.pause_notice import tell_of_pause
from pykvm.snapshot.x86 import clocks, vcpu_state, vm_state
from pykvm.snapshot.x86.features import require_features
from pykvm.snapshot.x86.structs import KvmStateError, field

__all__ = ["ArchitectureError", "ContextsError", "restore_kvm", "save_kvm"]


class ArchitectureError(PykvmError):
    """A machine of another architecture."""


class ContextsError(PykvmError):
    """A machine with ELISA contexts, which only the kernel that made them has."""


def save_kvm(vm: Vm, vcpus: Sequence[Vcpu]) -> dict[str, Any]:
    """Return the state of a VM none of whose vCPUs runs.

    Each vCPU must have completed its last exit: `Vcpu.run` has returned `Stopped`.

    Raises:
        ContextsError: the VM has ELISA contexts.
        VcpuRunningError: a vCPU runs.
        KvmError: KVM refuses a call.
    """
    _require_no_contexts(vm)
    listed = vm.kvm.get_msr_index_list()
    # The clock comes last: what saving takes has passed for the guest.
    return {
        "architecture": platform.machine(),
        "vcpus": [vcpu_state.save_vcpu(vcpu, listed) for vcpu in vcpus],
        "chips": vm_state.save_chips(vm),
        "kvmclock": clocks.save_kvmclock(vm),
    }


def restore_kvm(vm: Vm, vcpus: Sequence[Vcpu], state: Any) -> None:
    """Set the state of a new VM with memory, whose vCPUs have not run.

    Devices in user space come afterwards, because the interrupts that they raise would be lost.

    Args:
        vm: the VM, with the same interrupt controllers as the saved one.
        vcpus: its vCPUs, as many as the saved one had, in their order.
        state: what `save_kvm` returned.

    Raises:
        ArchitectureError: it is of another architecture.
        HostFeatureError: this processor or this KVM lacks something.
        TscFrequencyError: this host's time-stamp counter runs at another frequency.
        KvmStateError: no VM has such a state.
        KvmError: KVM refuses a call.
    """
    architecture = field(state, "architecture", str)
    if architecture != platform.machine():
        raise ArchitectureError(
            f"the snapshot is of a machine of {architecture}, and this host is "
            f"{platform.machine()}",
            "restore it on a host of that architecture",
        )
    saved = field(state, "vcpus", list)
    if [field(one, "id", int) for one in saved] != [vcpu.id for vcpu in vcpus]:
        raise KvmStateError("number of vcpus")
    leaves = [vcpu_state.saved_cpuid(one) for one in saved]
    require_features(vm.kvm, vcpus[0], leaves)
    clocks.restore_kvmclock(vm, field(state, "kvmclock", dict))
    for vcpu, one in zip(vcpus, saved, strict=True):
        vcpu_state.restore_registers(vcpu, one)
    clocks.restore_tscs(vcpus, [field(one, "tsc", dict) for one in saved])
    for vcpu, one in zip(vcpus, saved, strict=True):
        vcpu_state.restore_msrs_and_events(vcpu, one)
    vm_state.restore_chips(vm, field(state, "chips", dict))
    tell_of_pause(vcpus)


def _require_no_contexts(vm: Vm) -> None:
    """Check that no vCPU can be inside a context, where its registers are those of trusted code."""
    if not vm.check_extension("KVM_CAP_BINARY_STATS_FD"):
        return
    with vm.stats() as stats:
        contexts = stats.read().get("elisa_contexts", 0)
    if contexts:
        raise ContextsError(
            f"the machine has {contexts} elisa contexts, which no snapshot can hold",
            "detach it from its shared objects first",
        )
