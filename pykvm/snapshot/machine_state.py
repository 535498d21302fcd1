"""A paused machine as a whole: KVM's state, devices, memory and disks, in the order that keeps all.

To restore a machine, check its disks, map its memory, make a new VM with this memory, as many
vCPUs, interrupt controllers and devices, and call `restore_state` before the first vCPU runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pykvm.kvm import Vcpu, Vm
from pykvm.memory.guest_memory import GuestMemory
from pykvm.snapshot.disks import DiskChangedError, SavedDisk
from pykvm.snapshot.folder import Contents, SnapshotDamagedError
from pykvm.snapshot.folder_reader import Snapshot
from pykvm.snapshot.folder_writer import write_snapshot
from pykvm.snapshot.kvm_state import restore_kvm, save_kvm

__all__ = ["StatefulDevice", "require_disks", "require_same_disks", "restore_state", "save_machine"]


class StatefulDevice(Protocol):
    """A device in user space.

    `save` returns what the guest sees of it, as values for JSON. `restore` sets that in a new
    device, and raises its interrupt if it has anything to tell: a pulse that was on its way to the
    interrupt controller is in nobody's state, and one too many does no harm.
    """

    def save(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


def save_machine(
    path: Path,
    *,
    machine: Mapping[str, Any],
    vm: Vm,
    vcpus: Sequence[Vcpu],
    memory: GuestMemory,
    devices: Mapping[str, StatefulDevice],
    disks: Sequence[SavedDisk] = (),
) -> int:
    """Write a snapshot of a paused machine; return the bytes of memory that it holds beside zeros.

    Each vCPU must have completed its last exit (`Vcpu.run` has returned `Stopped`), and nobody may
    write to the memory. The machine can be resumed afterwards.

    Args:
        path: the folder, which must not exist.
        machine: the configuration, as values for JSON.
        vm: the VM.
        vcpus: its vCPUs.
        memory: its memory; shareable regions are saved faster.
        devices: devices in user space, by name.
        disks: its disks as they are now, with nothing in flight.

    Raises:
        SnapshotExistsError: there is something of that name already.
        SnapshotWriteError: it cannot be written.
        ContextsError: the VM has ELISA contexts.
        VcpuRunningError: a vCPU runs.
        KvmError: KVM refuses a call.
    """
    kvm = save_kvm(vm, vcpus)
    states = {name: device.save() for name, device in devices.items()}
    return write_snapshot(path, Contents(machine, kvm, states, disks), memory)


def require_disks(snapshot: Snapshot) -> None:
    """Check that all disks of a snapshot are as they were.

    Raises:
        DiskChangedError: one is not.
    """
    for disk in snapshot.contents.disks:
        disk.require_unchanged()


def require_same_disks(snapshot: Snapshot, disks: Sequence[SavedDisk]) -> None:
    """Check that a new machine has the disks of a snapshot.

    Raises:
        DiskChangedError: it has others.
    """
    wanted = [(disk.name, disk.path) for disk in snapshot.contents.disks]
    found = [(disk.name, disk.path) for disk in disks]
    for disk in sorted({*wanted} ^ {*found}):
        raise DiskChangedError(
            f"disk {disk[1]} belongs to the snapshot or to the machine alone",
            "give the machine the disks that it had",
        )


def restore_state(
    snapshot: Snapshot, vm: Vm, vcpus: Sequence[Vcpu], devices: Mapping[str, StatefulDevice]
) -> None:
    """Set the state of a new machine that has the snapshot's memory already.

    Args:
        snapshot: the snapshot.
        vm: a VM with memory slots, and with interrupt controllers as the saved one.
        vcpus: vCPUs that have not run.
        devices: devices by name, with their interrupts registered.

    Raises:
        SnapshotDamagedError: the machine has other devices than the snapshot.
        PykvmError: see `restore_kvm`, or what a device refuses.
    """
    states = snapshot.contents.devices
    if states.keys() != devices.keys():
        odd = ", ".join(sorted(states.keys() ^ devices.keys()))
        raise SnapshotDamagedError(
            f"the snapshot {snapshot.path} and its machine have not the same devices: {odd}",
            "use another copy of it",
        )
    restore_kvm(vm, vcpus, snapshot.contents.kvm)
    for name, device in devices.items():
        device.restore(states[name])
