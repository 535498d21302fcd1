"""Sessions of GDB itself with a machine that runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.inspection.gdb.server import GdbServer
from tests.rigs.inspected.machine import InspectedMachine, address_of, guest_file
from tests.rigs.needs import need_hardware
from tests.rigs.waiting import wait_for

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.native,
    pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb on this machine"),
]


def gdb(where: str, *commands: str) -> str:
    """Return what GDB prints for commands after it has connected to a stub."""
    every = ["set width 0", f"target remote {where}", *commands]
    done = subprocess.run(
        ["gdb", "-nx", "-q", "-batch", *(f"-ex={each}" for each in every), str(guest_file())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert "rror" not in done.stdout, done.stdout
    return done.stdout


def runs(machine: InspectedMachine) -> None:
    before = machine.word("counters")
    wait_for(lambda: machine.word("counters") > before)


def test_breakpoints_steps_and_memory(machine: InspectedMachine, stub: Path) -> None:
    said = gdb(
        str(stub),
        "info threads",
        "set scheduler-locking on",
        "break count",
        "continue",
        "stepi",
        "stepi",
        "x/i $pc",
        "delete",
        "hbreak stored",
        "continue",
        "backtrace 2",
        "set var *(long *)&block = 0x1234",
        "detach",
    )
    assert 'Thread 2 "vcpu 1" (runs)' in said
    assert "hit Breakpoint 1, " in said
    assert "<stored>:" in said
    assert "hit Breakpoint 2, " in said
    assert "in counting ()" in said
    assert "detached" in said
    assert machine.word("block") == 0x1234
    runs(machine)


def test_registers_have_types(stub: Path) -> None:
    said = gdb(
        str(stub),
        "info registers eflags cr0 cr4 efer cr3",
        "p $xmm0.v2_int64",
        "p $st0",
        "info registers",
        "p/x $idt_limit",
        "set $rax = 42",
        "p $rax",
    )
    assert "[ PE ET NE WP PG ]" in said
    assert "[ LME LMA NXE ]" in said
    assert "{0, 0}" in said
    assert "gdt_base" in said
    assert "0x3f" in said
    assert "$4 = 42" in said


def test_monitor_commands(stub: Path) -> None:
    said = gdb(str(stub), f"monitor walk {address_of('count'):#x}", "monitor exits")
    assert "level 2 table" in said
    assert "served by" in said


def test_threads_are_chosen_and_run_alone(machine: InspectedMachine, stub: Path) -> None:
    said = gdb(
        str(stub),
        "thread 2",
        "set scheduler-locking on",
        "break stored",
        "continue",
        "p $rdi",
        "info threads",
    )
    assert "* 2    Thread 2" in said
    assert "$1 = 1" in said


def test_finish(stub: Path) -> None:
    said = gdb(
        str(stub),
        "set scheduler-locking on",
        "break count",
        "continue",
        "delete",
        "finish",
        "p $rip",
    )
    assert "<counting+5>" in said


def test_watchpoints(stub: Path) -> None:
    need_hardware("watchpoints")
    said = gdb(
        str(stub),
        "watch *(long *)&counters",
        "continue",
        "continue",
        "p $rip",
        "delete",
        "awatch *(long *)&counters",
        "continue",
        "detach",
    )
    assert said.count("Hardware watchpoint 1: ") == 3
    assert "<stored>" in said
    assert "Hardware access (read/write) watchpoint 2" in said


def test_a_port(machine: InspectedMachine) -> None:
    with GdbServer.on_port(machine, 0) as server:
        assert "vcpu 1" in gdb(server.address, "info threads", "kill")
    assert machine.stopped.wait(30)


def test_gdb_that_is_killed(machine: InspectedMachine, stub: Path) -> None:
    process = subprocess.Popen(
        ["gdb", "-nx", "-q", "-ex", f"target remote {stub}", "-ex", "break count", "-ex", "c"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    said = ""
    while "Continuing" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.kill()
    process.communicate(timeout=30)
    runs(machine)
