"""A debugger stops a kernel that boots, looks around, and lets it go."""

import os
import platform
import re
import threading
from pathlib import Path

import pytest

from pykvm.inspection.gdb.server import GdbServer
from pykvm.inspection.gdb.target_description import REGISTERS
from pykvm.inspection.hang import report
from pykvm.kvm import Kvm
from pykvm.machine.linux.config import MachineConfig
from pykvm.machine.linux.machine import End, LinuxMachine
from pykvm.sizes import MIB
from tests.rigs.gdb_client import GdbClient
from tests.rigs.initramfs import initramfs
from tests.rigs.needs import need_hardware

pytestmark = [pytest.mark.kvm, pytest.mark.linux("6.1")]

KERNEL = Path("/boot") / f"vmlinuz-{platform.release()}"
LINE = "console=ttyS0 quiet cryptomgr.notests panic=-1 -- poweroff"
NUMBERS = {register.name: number for number, register in enumerate(REGISTERS)}
KERNEL_HALF = 0xFFFF_8000_0000_0000
ENTRY_AREA = (
    0xFFFF_FE00_0000_0000  # Linux Documentation/x86/x86_64/mm.rst, "cpu_entry_area mapping"
)
PAGE_FAULT = 14
LSTAR = 0xC000_0082  # SDM vol. 4, table 2-2: where SYSCALL leads


def register(client: GdbClient, name: str) -> int:
    return int.from_bytes(bytes.fromhex(client.ask(f"p{NUMBERS[name]:x}")), "little")


def handler(client: GdbClient, vector: int) -> int:
    """Return the address in a gate of the interrupt descriptor table (SDM vol. 3A, 6.14.1)."""
    gate = bytes.fromhex(client.ask(f"m{register(client, 'idt_base') + 16 * vector:x},10"))
    return int.from_bytes(gate[0:2] + gate[6:12], "little")


def word(client: GdbClient, address: int) -> int:
    return int.from_bytes(bytes.fromhex(client.ask(f"m{address:x},8")), "little")


def stopped(answer: str, reason: str) -> str:
    """Return the thread that has stopped the machine for this reason."""
    found = re.fullmatch(rf"T05thread:([12]);{reason}", answer)
    assert found, answer
    return found[1]


def test_a_kernel_that_boots_is_debugged(kvm: Kvm, tmp_path: Path) -> None:
    need_hardware("Linux guests")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initramfs())
    config = MachineConfig(
        kernel=KERNEL, initrds=(initrd,), command_line=LINE, memory=160 * MIB, cpus=2
    )
    read_end, write_end = os.pipe()
    ends: list[End] = []
    with LinuxMachine(kvm, config, write_end) as machine:
        runner = threading.Thread(target=lambda: ends.append(machine.run()))
        runner.start()
        with GdbServer.on_unix_socket(machine, tmp_path / "gdb") as server:
            debug(Path(server.address), machine)
            runner.join(400)
        machine.stop()
        runner.join(30)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as output:
        said = output.read().decode(errors="replace")
    assert ends == [End.POWER_OFF], said


def debug(path: Path, machine: LinuxMachine) -> None:
    # Early, in the first code of all; then, when the kernel has its last descriptor table.
    table = 0
    while table != ENTRY_AREA:
        threading.Event().wait(1)
        with GdbClient(path) as client:
            assert client.ask("?").startswith("T05thread:")
            address = register(client, "rip")
            code = client.ask(f"m{address:x},8")
            assert len(code) == 16
            table = register(client, "idt_base")
            assert client.ask("D") == "OK"
    with GdbClient(path) as client:
        assert "waits to be started" in client.ask("qXfer:threads:read::0,1000")
        fault = handler(client, PAGE_FAULT)
        assert fault > KERNEL_HALF
        walk = client.monitor(f"walk {fault:#x}").splitlines()
        assert walk[0].endswith(": 4 levels")
        assert "-> GPA " in walk[-1]
        assert re.search(r"\[r.xs 2M WB\]$", walk[-1])  # not yet read-only, so early
        client.socket.settimeout(300)
        rip = 0
        while rip == 0 or rip >= KERNEL_HALF:  # until the first process touches its memory
            assert client.ask(f"Z1,{fault:x},1") == "OK"
            thread = stopped(client.ask("vCont;c"), "hwbreak:;")
            assert register(client, "rip") == fault
            rip = word(client, register(client, "rsp") + 8)  # above the error code
            assert client.ask(f"z1,{fault:x},1") == "OK"
            assert client.ask(f"vCont;s:{thread}") == f"T05thread:{thread};"
        seen = set()
        for _ in range(10):
            assert client.ask(f"vCont;s:{thread}") == f"T05thread:{thread};"
            seen.add(register(client, "rip"))
        assert len(seen) > 5
        # Now that the kernel has patched its own code, breakpoints may be written to it. They are
        # as soon as the debug registers are used up. At the entry of system calls CR3 may still be
        # the process's.
        entry = machine.vcpus[int(thread) - 1].get_msrs([LSTAR])[LSTAR]
        code = client.ask(f"m{entry:x},10")
        for number in range(4):
            assert client.ask(f"Z1,{fault + 0x1000 + number:x},1") == "OK"
        assert client.ask(f"Z0,{entry:x},1") == "OK"
        stopped(client.ask("vCont;c"), "swbreak:;")
        assert register(client, "rip") == entry
        assert client.ask(f"m{entry:x},10") == code
        assert client.ask("D") == "OK"
    text = report(machine)
    assert "page walk of the instruction:" in text
