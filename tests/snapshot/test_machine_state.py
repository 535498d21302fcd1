"""A machine is saved in the middle of its work, and goes on in a new process."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pykvm.devices.serial import Serial
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm, Stopped, VcpuRunningError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.snapshot.folder import SnapshotDamagedError
from pykvm.snapshot.folder_reader import Snapshot
from pykvm.snapshot.machine_state import restore_state, save_machine
from tests.rigs.messages import one_line
from tests.rigs.real_mode import RealModeGuest, deadline
from tests.snapshot.counting_guest import (
    END_PORT,
    ENTRIES,
    MIDDLE,
    MIDDLE_PORT,
    SIZE,
    done,
    make_vm,
    run_to,
    start,
)

pytestmark = [pytest.mark.kvm, pytest.mark.native]

_GOES_ON = """\
import sys
from pathlib import Path
from pykvm.devices.serial import Serial
from pykvm.kvm import Kvm
from pykvm.snapshot.folder_reader import Snapshot
from pykvm.snapshot.machine_state import restore_state
from tests.snapshot.counting_guest import END_PORT, ENTRIES, MIDDLE, done, make_vm, run_to

path, irqchip, way = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
with Kvm() as kvm, Snapshot(path) as snapshot:
    with (snapshot.map_memory() if way == "map" else snapshot.copy_memory()) as memory:
        before = done(memory)
        vm, vcpu = make_vm(kvm, memory, irqchip=irqchip)
        with vm:
            serial = Serial()
            restore_state(snapshot, vm, [vcpu], {"com1": serial})
            run_to(vcpu, END_PORT)
            after = done(memory)
            print(before.count(1), set(before[:MIDDLE]), set(before[MIDDLE:]))
            print(after.count(1), serial.save()["scr"], snapshot.contents.machine["name"])
            serial.close()
"""


@pytest.mark.parametrize(("irqchip", "way"), [(False, "map"), (True, "copy")])
def test_a_new_process_goes_on(kvm: Kvm, tmp_path: Path, irqchip: bool, way: str) -> None:
    path = tmp_path / "snapshot"
    with GuestMemory.create(SIZE, shareable=True) as memory:
        vm, vcpu = make_vm(kvm, memory, irqchip=irqchip)
        with vm:
            start(kvm, memory, vcpu)
            run_to(vcpu, MIDDLE_PORT)
            serial = Serial()
            serial.restore({**serial.save(), "scr": 77})
            saved = save_machine(
                path,
                machine={"name": "counting"},
                vm=vm,
                vcpus=[vcpu],
                memory=memory,
                devices={"com1": serial},
            )
            serial.close()
            assert 0 < saved < SIZE  # neither stack nor the rest of the table
            # The saved file stays as it is, and serves more than once.
            for _ in range(1 if is_emulated() else 2):
                output = subprocess.run(
                    [sys.executable, "-c", _GOES_ON, str(path), str(irqchip), way],
                    cwd=Path(__file__).parents[2],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                )
                assert output.returncode == 0, output.stderr
                assert output.stdout.splitlines() == [
                    f"{MIDDLE} {{1}} {{0}}",
                    f"{ENTRIES} 77 counting",
                ]
            # The machine itself has not noticed, and goes on too.
            run_to(vcpu, END_PORT)
            assert done(memory) == b"\1" * ENTRIES


def test_stopped_anywhere(kvm: Kvm, tmp_path: Path) -> None:
    """A guest that counts in a register and in memory is stopped between any two instructions."""
    with kvm.create_vm() as vm:
        vm.set_tss_address(0xFFFBD000)
        guest = RealModeGuest(vm)
        guest.vcpu.set_cpuid2(kvm.get_supported_cpuid())
        guest.load("""
            66 40           ; inc eax
            66 A3 00 20     ; mov [0x2000], eax
            EB F8           ; jmp to the first one
        """)
        machine, vcpu, stops = vm, guest.vcpu, 5
        memory = GuestMemory.create(0x10000)
        last = 0
        for turn in range(stops):
            with deadline(vcpu, 0.05):
                assert vcpu.run() == Stopped()
            if turn == 0:
                memory.write(0, guest.memory[:])
            path = tmp_path / str(turn)
            save_machine(path, machine={}, vm=machine, vcpus=[vcpu], memory=memory, devices={})
            memory.close()
            if turn:
                machine.close()
            with Snapshot(path) as snapshot:
                memory = snapshot.map_memory()
                machine, vcpu = make_vm(kvm, memory, irqchip=False)
                restore_state(snapshot, machine, [vcpu], {})
            counted = int.from_bytes(memory.read(0x2000, 4), "little")
            regs = vcpu.get_regs()
            # Between the two instructions the register is ahead.
            assert regs.rax - counted == int(regs.rip == 0x1002), (regs.rip, regs.rax, counted)
            assert counted > last
            last = counted
        machine.close()
        memory.close()


def test_a_running_machine(kvm: Kvm, tmp_path: Path) -> None:
    with kvm.create_vm() as vm:
        vm.set_tss_address(0xFFFBD000)
        guest = RealModeGuest(vm)
        guest.load("EB FE ; jmp to itself")
        thread = threading.Thread(target=guest.vcpu.run)
        thread.start()
        while not guest.vcpu.running:
            pass
        with GuestMemory.create(4096) as memory, pytest.raises(VcpuRunningError):
            save_machine(
                tmp_path / "s", machine={}, vm=vm, vcpus=[guest.vcpu], memory=memory, devices={}
            )
        guest.vcpu.stop()
        thread.join()
    assert not list(tmp_path.iterdir())


def test_other_devices(kvm: Kvm, tmp_path: Path) -> None:
    serial = Serial()
    with GuestMemory.create(SIZE) as memory:
        vm, vcpu = make_vm(kvm, memory, irqchip=False)
        with vm:
            save_machine(
                tmp_path / "s",
                machine={},
                vm=vm,
                vcpus=[vcpu],
                memory=memory,
                devices={"com1": serial},
            )
            with Snapshot(tmp_path / "s") as snapshot:
                with pytest.raises(SnapshotDamagedError, match="com1, com2") as caught:
                    restore_state(snapshot, vm, [vcpu], {"com2": serial})
                one_line(caught.value)
    serial.close()
