"""A debugger's packets, against a machine that runs: registers, memory, threads, execution."""

import threading
import time
from pathlib import Path

import pytest

from pykvm.inspection.gdb.server import GdbServer
from pykvm.inspection.gdb.target_description import REGISTERS
from tests.rigs.gdb_client import GdbClient
from tests.rigs.inspected.machine import HIGH, InspectedMachine, NewMachine, address_of
from tests.rigs.needs import need_hardware
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.kvm, pytest.mark.native]

COUNT, STORED = address_of("count"), address_of("stored")
NUMBERS = {register.name: number for number, register in enumerate(REGISTERS)}


def register(client: GdbClient, name: str) -> int:
    digits = client.ask(f"p{NUMBERS[name]:x}")
    return int.from_bytes(bytes.fromhex(digits), "little")


def set_register(client: GdbClient, name: str, value: int) -> str:
    size = REGISTERS[NUMBERS[name]].size
    return client.ask(f"P{NUMBERS[name]:x}={value.to_bytes(size, 'little').hex()}")


def runs(machine: InspectedMachine, number: int = 0) -> bool:
    before = machine.word("counters", number)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if machine.word("counters", number) > before:
            return True
    return False


def stands(machine: InspectedMachine, number: int = 0) -> bool:
    before = machine.word("counters", number)
    threading.Event().wait(0.05)
    return machine.word("counters", number) == before


# ---- the connection ------------------------------------------------------------------------------


def test_the_machine_stands_while_a_client_is_there(machine: InspectedMachine, stub: Path) -> None:
    assert runs(machine)
    with GdbClient(stub) as client:
        assert client.ask("?") == "T05thread:1;"
        assert stands(machine)
        assert client.ask("D") == "OK"
        assert client.is_closed()
    assert runs(machine)


def test_what_the_stub_offers(client: GdbClient) -> None:
    assert {"PacketSize=4000", "swbreak+", "qXfer:features:read+"} <= set(client.features)
    assert client.ask("vMustReplyEmpty") == ""
    assert client.ask("qAttached") == "1"
    assert client.ask("vCont?") == "vCont;c;C;s;S"
    assert client.ask("!") == ""
    assert client.ask("qXfer:auxv:read::0,100") == ""


def test_the_description_comes_in_parts(client: GdbClient) -> None:
    text, answer = "", "m"
    while answer[0] == "m":
        answer = client.ask(f"qXfer:features:read:target.xml:{len(text):x},1f0")
        text += answer[1:]
    assert text.startswith("<?xml")
    assert text.endswith("</target>\n")
    assert text.count("<reg ") == len(REGISTERS)
    assert client.ask(f"qXfer:features:read:target.xml:{len(text) + 9:x},10") == "l"


def test_a_client_that_kills_ends_the_machine(machine: InspectedMachine, stub: Path) -> None:
    with GdbClient(stub) as client:
        client.send("k")
        assert client.is_closed()
    assert machine.stopped.wait(30)
    assert machine.gate.closed


def test_the_end_of_the_machine_is_told(machine: InspectedMachine, client: GdbClient) -> None:
    client.send("vCont;c")
    assert runs(machine)
    machine.stop()
    assert client.receive() == "W00"
    assert client.is_closed()


# ---- threads -------------------------------------------------------------------------------------


def test_threads(client: GdbClient) -> None:
    assert client.ask("qfThreadInfo") == "m1,2"
    assert client.ask("qsThreadInfo") == "l"
    assert client.ask("qC") == "QC1"
    assert client.ask("T2") == "OK"
    for wrong in ("T3", "Hg3", "Hx1", "Hg", "T", "Hgx"):
        assert client.ask(wrong) == "E16"
    names = client.ask("qXfer:threads:read::0,1000")
    assert '<thread id="2" core="1" name="vcpu 1">runs</thread>' in names
    assert bytes.fromhex(client.ask("qThreadExtraInfo,2")) == b"runs"


def test_each_thread_has_its_registers(client: GdbClient) -> None:
    for thread in (1, 2):
        assert client.ask(f"Hg{thread}") == "OK"
        assert register(client, "rdi") == thread - 1
    assert client.ask("Hg0") == "OK"
    assert register(client, "rdi") == 1


def test_one_thread_runs_and_the_other_stands(machine: InspectedMachine, client: GdbClient) -> None:
    client.send("vCont;c:2")
    assert runs(machine, 1)
    assert stands(machine, 0)
    client.interrupt()
    assert client.receive().startswith("T02thread:")
    assert stands(machine, 1)


# ---- registers -----------------------------------------------------------------------------------


def test_all_registers_at_once(machine: InspectedMachine, client: GdbClient) -> None:
    digits = client.ask("g")
    assert len(digits) == 2 * sum(each.size for each in REGISTERS)
    regs = machine.vcpus[0].get_regs()
    assert digits[:16] == regs.rax.to_bytes(8, "little").hex()
    assert client.ask(f"G{digits}") == "OK"
    assert client.ask("g") == digits
    assert machine.vcpus[0].get_regs().rip == regs.rip


def test_registers_are_written(client: GdbClient) -> None:
    for name, value in {
        "rax": 0x1122_3344_5566_7788,
        "r15": 2**64 - 1,
        "eflags": 0x246,
        "fs_base": 0x7FFF_0000_1000,
        "k_gs_base": HIGH,
        "cr2": 0x1234_5000,
        "cr8": 5,
        "st3": 0x4000_C90F_DAA2_2168_C235,
        "xmm15": 2**127 + 5,
        "mxcsr": 0x1F80,
        "fctrl": 0x27F,
        "fioff": 0x8765_4321,
    }.items():
        assert set_register(client, name, value) == "OK"
        assert register(client, name) == value, name


def test_tags_of_the_x87_stack(client: GdbClient) -> None:
    assert register(client, "ftag") == 0xFFFF
    assert set_register(client, "ftag", 0xFFFC) == "OK"  # physical register 0 has a value
    assert register(client, "ftag") == 0xFFFD  # which is zero
    assert set_register(client, "st0", 0x4000_C90F_DAA2_2168_C235) == "OK"
    assert register(client, "ftag") == 0xFFFC
    assert set_register(client, "st0", 0x7FFF_8000_0000_0000_0000) == "OK"  # infinity
    assert register(client, "ftag") == 0xFFFE


def test_registers_that_cannot_be_written(client: GdbClient) -> None:
    before = client.ask("g")
    assert set_register(client, "cs", 0x33).startswith("E.cs cannot be changed")
    assert set_register(client, "cs", 0x08) == "OK"  # it has the value already
    assert set_register(client, "gdt_limit", 0x10000).startswith("E.0x10000 for gdt_limit")
    assert set_register(client, "efer", 0).startswith("E.KVM_SET_SREGS failed")
    assert client.ask(f"p{len(REGISTERS):x}") == "E16"
    assert client.ask("P0=00").startswith("E.1 bytes for rax")
    for wrong in ("p", "px", "P0", "P0=0", "P0=zz", "G00", "Gx", "p-1", "p" + "1" * 17):
        assert client.ask(wrong).startswith("E")
    assert client.ask("g") == before


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_read_through_the_page_tables(
    machine: InspectedMachine, client: GdbClient
) -> None:
    block = address_of("block")
    machine.memory.write(block, bytes(range(64)))
    assert client.ask(f"m{block:x},40") == bytes(range(64)).hex()
    assert client.ask(f"m{HIGH + block:x},4") == "00010203"
    assert client.ask("m200000,1") == machine.memory.read(0, 1).hex()


def test_memory_is_read_as_far_as_there_is_some(client: GdbClient) -> None:
    last = 0x200000 + (511 << 12)  # the page there is not mapped
    assert len(client.ask(f"m{last - 2:x},10")) == 4
    assert client.ask(f"m{last:x},10") == "E0e"
    assert client.ask("m1234567890abcdef,8") == "E0e"  # not canonical
    assert client.ask("mffffffffffffffff,8") == "E0e"
    assert len(client.ask("m0,ffffffffffffffff")) == 0x4000
    assert client.ask("m0,0") == ""


def test_memory_is_written(machine: InspectedMachine, client: GdbClient) -> None:
    block = address_of("block")
    assert client.ask(f"M{block:x},3:010203") == "OK"
    assert machine.memory.read(block, 4) == b"\x01\x02\x03\x00"
    assert client.ask(f"X{block + 1:x},4:a}}\x03}}]\xff") == "OK"
    assert machine.memory.read(block, 5) == b"\x01a#}\xff"
    assert client.ask(f"X{block:x},0:") == "OK"
    last = 0x200000 + (511 << 12)
    before = machine.memory.read(510 << 12, 4096)
    assert client.ask(f"M{last - 2:x},4:aabbccdd") == "E0e"
    assert machine.memory.read(510 << 12, 4096) == before  # all or nothing
    for wrong in ("M0,1", "M0,2:00", "M0:00", "X0,1:", "M0,1:0", "m0", "m0,0,0", "m,", "mx,1"):
        assert client.ask(wrong).startswith("E")


# ---- execution -----------------------------------------------------------------------------------


def test_single_steps(client: GdbClient) -> None:
    assert client.ask(f"Z1,{COUNT:x},1") == "OK"
    assert client.ask("vCont;c:1") == "T05thread:1;hwbreak:;"
    assert client.ask(f"z1,{COUNT:x},1") == "OK"
    rbx = register(client, "rbx")
    seen = []
    for _ in range(4):  # Bochs traps once more, before the first instruction
        assert client.ask("vCont;s:1") == "T05thread:1;"
        seen.append(register(client, "rip"))
        if seen[-1] == STORED:
            break
    assert seen[-1] == STORED
    assert register(client, "rbx") == rbx + 1


@pytest.mark.parametrize("kind", ["Z0", "Z1"])
def test_breakpoints(machine: InspectedMachine, client: GdbClient, kind: str) -> None:
    reason = {"Z0": "swbreak", "Z1": "hwbreak"}[kind]
    assert client.ask(f"{kind},{COUNT:x},1") == "OK"
    assert client.ask(f"{kind},{COUNT:x},1") == "OK"  # twice is once
    assert client.ask("vCont;c:2") == f"T05thread:2;{reason}:;"
    assert register(client, "rip") == COUNT
    assert register(client, "rdi") == 1
    # Both arrive: one is told now, the other when it has run on.
    assert client.ask("vCont;c").endswith(f"{reason}:;")
    assert client.ask(f"z{kind[1]},{COUNT:x},1") == "OK"
    client.send("c")
    assert runs(machine)
    assert runs(machine, 1)


def test_ctrl_c(machine: InspectedMachine, client: GdbClient) -> None:
    for _ in range(5):
        client.send("c")
        assert runs(machine)
        assert client.ask("m0,1") == "E.the machine runs"
        client.interrupt()
        assert client.receive() == "T02thread:1;"
        assert stands(machine)
    client.interrupt()  # while it stands: nothing
    assert client.ask("qC") == "QC1"


def test_continue_at_an_address(client: GdbClient) -> None:
    assert client.ask("Hc1") == "OK"
    assert client.ask(f"Z1,{STORED:x},1") == "OK"
    assert set_register(client, "rbx", 41) == "OK"
    assert client.ask(f"c{address_of('counting'):x}") == "T05thread:1;hwbreak:;"
    assert register(client, "rbx") == 42
    for wrong in ("cx", "sx", "C05;x", "vCont", "vCont;", "vCont;x", "vCont;c:9", "vCont;C0"):
        assert client.ask(wrong) == "E16"


def test_five_hardware_breakpoints(client: GdbClient) -> None:
    for number in range(4):
        assert client.ask(f"Z1,{COUNT + number:x},1") == "OK"
    assert client.ask(f"Z1,{COUNT + 4:x},1").startswith("E.no debug register is left")
    assert client.ask(f"Z2,{COUNT:x},8").startswith("E.no debug register is left")
    assert client.ask(f"z1,{COUNT:x},1") == "OK"
    assert client.ask(f"Z1,{COUNT + 4:x},1") == "OK"


def test_points_that_make_no_sense(client: GdbClient) -> None:
    assert client.ask(f"Z3,{COUNT:x},4") == ""  # read watchpoints: there are none
    assert client.ask("Z9,0,1") == ""
    assert client.ask("Z0,12345678,1").startswith("E.the guest maps nothing")
    assert client.ask("Z2,0,21").startswith("E.a watchpoint of 33 bytes")
    assert client.ask("Z2,0,0").startswith("E.a watchpoint of 0 bytes")
    for wrong in ("Z0", "Z0,", "Z0,x,1", "Z0,0", "z0"):
        assert client.ask(wrong) == "E16"
    assert client.ask("z0,777,1") == "OK"


def test_more_breakpoints_than_debug_registers(
    machine: InspectedMachine, client: GdbClient
) -> None:
    need_hardware("INT3 that stops a guest")
    code = machine.memory.read(COUNT, 32)
    for address in (0, 1, 2, 3):
        assert client.ask(f"Z1,{address_of('dead') + address:x},1") == "OK"
    for symbol in ("count", "stored"):
        assert client.ask(f"Z0,{address_of(symbol):x},1") == "OK"
    assert client.ask("vCont;c:1") == "T05thread:1;swbreak:;"
    assert register(client, "rip") in (COUNT, STORED)
    assert machine.memory.read(COUNT, 32) == code  # as long as the machine stands
    at = register(client, "rip")
    assert client.ask(f"z0,{at:x},1") == "OK"
    assert client.ask("vCont;c:1") == "T05thread:1;swbreak:;"
    assert register(client, "rip") == (STORED if at == COUNT else COUNT)
    assert client.ask("D") == "OK"
    wait_for(lambda: machine.memory.read(COUNT, 32) == code)
    assert runs(machine)


@pytest.mark.parametrize(("kind", "reason"), [("Z2", "watch"), ("Z4", "awatch")])
def test_watchpoints(client: GdbClient, kind: str, reason: str) -> None:
    need_hardware("watchpoints")
    counter = address_of("counters") + 8
    assert client.ask(f"{kind},{counter:x},8") == "OK"
    assert client.ask("vCont;c") == f"T05thread:2;{reason}:{counter:x};"
    assert register(client, "rip") == STORED
    before = register(client, "rbx")
    assert client.ask("vCont;c") == f"T05thread:2;{reason}:{counter:x};"
    assert register(client, "rbx") == before + 1


def test_a_watchpoint_that_needs_several_registers(client: GdbClient) -> None:
    need_hardware("watchpoints")
    start = address_of("counters") - 4
    assert client.ask(f"Z2,{start:x},c") == "OK"
    assert client.ask("vCont;c:1") == f"T05thread:1;watch:{start:x};"


def test_the_guests_own_int3_reaches_the_guest(new_machine: NewMachine, tmp_path: Path) -> None:
    need_hardware("INT3 that stops a guest")
    machine = new_machine(entry="trapping")
    wait_for(lambda: machine.word("traps") > 10)
    path = tmp_path / "trapping"
    with GdbServer.on_unix_socket(machine, path), GdbClient(path) as client:
        for address in (0, 1, 2, 3):  # no debug register is left
            assert client.ask(f"Z1,{COUNT + address:x},1") == "OK"
        assert client.ask(f"Z0,{address_of('dead'):x},1") == "OK"
        before = machine.word("traps")
        client.send("vCont;c")
        wait_for(lambda: machine.word("traps") > before + 10)
        client.interrupt()
        assert client.receive().startswith("T02")
        # A breakpoint at the very place of the guest's own is the debugger's.
        assert client.ask(f"Z0,{address_of('own_int3'):x},1") == "OK"
        assert client.ask("vCont;c") == "T05thread:1;swbreak:;"


# ---- monitor -------------------------------------------------------------------------------------


def test_monitor_commands(client: GdbClient) -> None:
    assert client.monitor("exits").splitlines()[0].split()[:3] == ["exits", "served", "by"]
    assert client.monitor(f"walk {COUNT:#x}").splitlines()[-1] == (
        f"GVA {COUNT:#x} -> GPA {COUNT:#x} [rwxs 2M WB]"
    )
    assert "vcpu 1: runs" in client.monitor("report")
    for wrong in ("", "nonsense", "walk", "walk 1 2", "help"):
        assert "monitor walk ADDRESS" in client.monitor(wrong)
    assert "is no address" in client.monitor("walk x")
    assert client.ask("qRcmd,0") == "E16"
    assert "monitor" in client.monitor("\x00\xff" * 500)


def test_a_step_over_output(new_machine: NewMachine, tmp_path: Path) -> None:
    """The access is served once, and the step ends behind it."""
    need_hardware("step that ends at an access which user space serves")
    machine = new_machine(entry="printing")
    wait_for(lambda: machine.output)
    path = tmp_path / "printing"
    with GdbServer.on_unix_socket(machine, path), GdbClient(path) as client:
        out, behind = address_of("printing") + 2, address_of("printing") + 4
        assert client.ask("m" + f"{out:x},2") == "e610"
        assert client.ask(f"Z1,{out:x},1") == "OK"
        assert client.ask("vCont;c") == "T05thread:1;hwbreak:;"
        assert client.ask(f"z1,{out:x},1") == "OK"
        before = len(machine.output)
        while register(client, "rip") != behind:  # Bochs traps once more, before it
            assert client.ask("vCont;s:1") == "T05thread:1;"
            assert register(client, "rip") in (out, behind)
        assert len(machine.output) == before + 1
        assert machine.output[-1] == register(client, "rbx") & 0xFF
