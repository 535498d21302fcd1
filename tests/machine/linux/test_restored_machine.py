"""Machines that are saved before they run, with their devices, and restored from the folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pykvm.devices.virtio.block import DiskInUseError
from pykvm.devices.virtio.entropy import Entropy
from pykvm.inspection.vcpu_gate import PauseError
from pykvm.kvm import Kvm
from pykvm.machine.linux import layout
from pykvm.machine.linux.config import Disk, MachineConfig, MachineConfigError
from pykvm.machine.linux.machine import LinuxMachine
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from pykvm.snapshot.disks import DiskChangedError
from pykvm.snapshot.folder import Contents, SnapshotDamagedError, SnapshotExistsError
from pykvm.snapshot.folder_writer import write_snapshot
from tests.rigs.kernel_files import elf
from tests.rigs.messages import one_line

pytestmark = [pytest.mark.kvm, pytest.mark.native]

GENERATION = slice(layout.GENERATION_GPA, layout.GENERATION_GPA + 16)


@pytest.fixture
def config(tmp_path: Path) -> MachineConfig:
    """A machine with a kernel that never runs, and a disk."""
    kernel, disk = tmp_path / "kernel", tmp_path / "disk.raw"
    kernel.write_bytes(elf([(16 * MIB, b"kernel", 4096)]))
    disk.write_bytes(bytes(MIB))
    return MachineConfig(kernel, unpack=False, memory=64 * MIB, cpus=2, disks=(Disk(disk),))


@contextmanager
def open_files_stay() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def contents(machine: LinuxMachine) -> bytes:
    data = bytearray(machine.memory.read(0, 64 * MIB))
    data[GENERATION] = bytes(16)
    return bytes(data)


@pytest.mark.parametrize("shareable", [False, True])
def test_there_and_back(kvm: Kvm, config: MachineConfig, tmp_path: Path, shareable: bool) -> None:
    path = tmp_path / "snapshot"
    with open_files_stay():
        with LinuxMachine(kvm, config) as machine:
            machine.add_device(Entropy(machine.memory))
            size = machine.snapshot(path)
            assert 0 < size < MIB
            with pytest.raises(SnapshotExistsError):
                machine.snapshot(path)
            saved, generation = contents(machine), machine.memory.read(GENERATION.start, 16)
            registers = [(vcpu.get_regs().rip, vcpu.get_mp_state()) for vcpu in machine.vcpus]
            with pytest.raises(DiskInUseError):
                LinuxMachine.restore(kvm, path)
        config.kernel.unlink()
        with LinuxMachine.restore(
            kvm, path, None, lambda it: it.add_device(Entropy(it.memory)), shareable=shareable
        ) as machine:
            assert machine.config == config
            assert contents(machine) == saved
            assert any(generation)
            assert machine.memory.read(GENERATION.start, 16) not in (generation, bytes(16))
            assert registers == [(v.get_regs().rip, v.get_mp_state()) for v in machine.vcpus]
            assert machine.memory.regions[0].shareable == shareable
            machine.snapshot(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "manifest.json").read_text())
    first = json.loads((path / "manifest.json").read_text())
    assert {**again["devices"]} == {**first["devices"]}
    assert again["disks"] == first["disks"]


def test_another_disk(kvm: Kvm, config: MachineConfig, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with LinuxMachine(kvm, config) as machine:
        machine.snapshot(path)
    (disk,) = config.disks
    with open_files_stay():
        disk.path.write_bytes(b"1" * MIB)
        with pytest.raises(DiskChangedError, match="has changed since"):
            LinuxMachine.restore(kvm, path)


def test_other_devices(kvm: Kvm, config: MachineConfig, tmp_path: Path) -> None:
    with LinuxMachine(kvm, config) as machine:
        machine.snapshot(tmp_path / "snapshot")
    with (
        open_files_stay(),
        pytest.raises(SnapshotDamagedError, match="not the same devices"),
    ):
        LinuxMachine.restore(
            kvm, tmp_path / "snapshot", None, lambda it: it.add_device(Entropy(it.memory))
        )


def test_another_kind_of_machine(kvm: Kvm, tmp_path: Path) -> None:
    with GuestMemory.create(MIB) as memory:
        write_snapshot(tmp_path / "snapshot", Contents({"wheels": 4}, {}, {}), memory)
    with open_files_stay(), pytest.raises(MachineConfigError) as caught:
        LinuxMachine.restore(kvm, tmp_path / "snapshot")
    one_line(caught.value)


def test_a_machine_that_has_ended(kvm: Kvm, config: MachineConfig, tmp_path: Path) -> None:
    with LinuxMachine(kvm, config) as machine:
        machine.stop()
        with pytest.raises(PauseError, match="has ended"):
            machine.snapshot(tmp_path / "snapshot")
    assert not (tmp_path / "snapshot").exists()
