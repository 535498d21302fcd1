"""Snapshots: a paused machine in a folder, and a new process that goes on with it.

- `kvm_state`: what KVM holds of a VM and its vCPUs, as values for JSON; `x86` is its larger part.
- `memory`: guest memory in a sparse file, and back, lazily or at once.
- `folder`: its format; `folder_writer` and `folder_reader` write and read it.
- `machine_state`: the three together, and devices.
- `pause_notice`: tells guests that they were away.
"""
