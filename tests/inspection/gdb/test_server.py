"""pykvm.inspection.gdb.server: who may connect, and clients that are none."""

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm.inspection.gdb.packets import encode
from pykvm.inspection.gdb.server import GdbServer, GdbServerError
from pykvm.kvm import Kvm, UnexpectedExitError
from tests.rigs.gdb_client import GdbClient
from tests.rigs.inspected.machine import InspectedMachine, address_of
from tests.rigs.messages import one_line
from tests.rigs.waiting import wait_for

pytestmark = [pytest.mark.kvm, pytest.mark.native]

COUNT = address_of("count")
EXAMPLES = int(os.environ.get("PYKVM_GDB_EXAMPLES", "50"))


def connect(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(30)
    made.connect(str(path))
    return made


def wait_until_it_runs(machine: InspectedMachine) -> None:
    before = machine.word("counters")
    wait_for(lambda: machine.word("counters") > before)


def test_the_socket_is_this_users_alone(machine: InspectedMachine, tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    old = os.umask(0)
    try:
        server = GdbServer.on_unix_socket(machine, path)
    finally:
        os.umask(old)
    with server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.address == str(path)
    assert not path.exists()
    server.close()


def test_a_port_of_this_machine(machine: InspectedMachine) -> None:
    with GdbServer.on_port(machine, 0) as server:
        host, port = server.address.split(":")
        assert host == "127.0.0.1"
        with GdbClient(int(port)) as client:
            assert client.ask("qC") == "QC1"
        with pytest.raises(GdbServerError, match="give another port") as caught:
            GdbServer.on_port(machine, int(port))
        one_line(caught.value)
    with pytest.raises(GdbServerError, match="no port 70000") as caught:
        GdbServer.on_port(machine, 70000)
    one_line(caught.value)


def test_paths_that_cannot_be(machine: InspectedMachine, stub: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path, why in [
        (file, "is no socket"),
        (stub, "somebody listens"),
        (tmp_path / "none" / "gdb", "no such file"),
        (tmp_path / ("x" * 200), "too long"),
    ]:
        with pytest.raises(GdbServerError, match=why) as caught:
            GdbServer.on_unix_socket(machine, path)
        assert "another path" in one_line(caught.value)
    assert file.read_text() == "mine"


def test_a_stale_socket_is_replaced(machine: InspectedMachine, tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with GdbServer.on_unix_socket(machine, path), GdbClient(path) as client:
        assert client.ask("qC") == "QC1"


def test_one_client_at_a_time(machine: InspectedMachine, stub: Path) -> None:
    with GdbClient(stub) as first:
        with connect(stub) as second:
            assert second.recv(1) == b""
        assert first.ask("qC") == "QC1"
    with GdbClient(stub) as third:
        assert third.ask("qC") == "QC1"


def test_a_client_that_vanishes(machine: InspectedMachine, stub: Path) -> None:
    code = machine.memory.read(COUNT, 16)
    client = GdbClient(stub)
    assert client.ask(f"Z0,{COUNT:x},1") == "OK"
    client.send("c")
    client.close()
    wait_until_it_runs(machine)
    assert machine.memory.read(COUNT, 16) == code
    before = machine.word("counters")
    wait_for(lambda: machine.word("counters") > before + 1000)  # no breakpoint is left
    with GdbClient(stub) as again:
        assert again.ask("?") == "T05thread:1;"


def test_a_server_that_closes_lets_the_machine_run(
    machine: InspectedMachine, tmp_path: Path
) -> None:
    with GdbServer.on_unix_socket(machine, tmp_path / "gdb") as server:
        client = GdbClient(tmp_path / "gdb")
        server.close()
        assert client.is_closed()
        client.close()
    wait_until_it_runs(machine)
    with GdbServer.on_unix_socket(machine, tmp_path / "gdb"), GdbClient(tmp_path / "gdb") as again:
        assert again.ask("qC") == "QC1"


def test_a_client_that_reads_nothing(
    machine: InspectedMachine, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pykvm.inspection.gdb.server._SEND_TIMEOUT", 0.2)
    with connect(stub) as client:
        client.settimeout(0.5)
        with pytest.raises(OSError, match=r"timed out|reset|Broken pipe"):
            client.sendall(encode(b"m0,2000") * 100_000)
        wait_until_it_runs(machine)


def test_acknowledgements(stub: Path) -> None:
    with connect(stub) as client:
        client.sendall(b"$qC#00")
        assert client.recv(100) == b"-"
        client.sendall(encode(b"qC"))
        answer = b""
        while len(answer) < 8:
            answer += client.recv(100)
        assert answer == b"+$QC1#c5"
        client.sendall(b"-")  # once more, please
        assert client.recv(100) == b"$QC1#c5"


def test_a_packet_without_an_end(machine: InspectedMachine, stub: Path) -> None:
    with connect(stub) as client:
        client.sendall(b"$" + b"a" * 20000)
        assert client.recv(1) == b""
    wait_until_it_runs(machine)


def test_a_second_debugger_is_refused(machine: InspectedMachine, tmp_path: Path) -> None:
    with (
        GdbServer.on_unix_socket(machine, tmp_path / "one"),
        GdbServer.on_unix_socket(machine, tmp_path / "two"),
        GdbClient(tmp_path / "one") as first,
    ):
        with connect(tmp_path / "two") as second:
            assert second.recv(1) == b""
        assert first.ask("qC") == "QC1"


# ---- rubbish -------------------------------------------------------------------------------------

HEX = st.integers(0, 2**64 - 1).map(lambda number: f"{number:x}")
ARGUMENTS = st.one_of(
    HEX,
    st.sampled_from(["", "-1", "0", "1", "2", ",", ":", ";", "=", "c", "s:1", "read:target.xml:"]),
    st.text("0123456789abcdef,:;=?+-x#$} ", max_size=12),
    st.binary(max_size=30).map(lambda data: data.decode("latin-1")),
)
NAMES = st.sampled_from(
    [
        *"?gGpPmMXHTcCsSDkZz!",
        *("Z0,", "Z1,", "Z2,", "z0,", "vCont", "vCont?", "vCont;c", "vCont;s:", "vRun", "vKill"),
        *("qSupported:", "qXfer:", "qXfer:features:read:target.xml:", "qXfer:threads:read::"),
        *("qRcmd,", "qThreadExtraInfo,", "qfThreadInfo", "QStartNoAckMode", "vMustReplyEmpty"),
    ]
)
PACKETS = st.tuples(NAMES, st.lists(ARGUMENTS, max_size=4)).map(
    lambda parts: encode((parts[0] + "".join(parts[1])).encode("latin-1"))
)
STREAMS = st.lists(st.one_of(PACKETS, st.sampled_from([b"\x03", b"+", b"-"]), st.binary()))


@pytest.mark.native
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=STREAMS)
def test_rubbish_harms_nothing(
    kvm: Kvm, tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    """Whatever a client sends, the next one is served.

    What it writes to registers and memory may end the guest, and then the machine, but no more.
    """
    stream = b"".join(pieces)
    path = tmp_path_factory.mktemp("rubbish") / "gdb"
    machine = InspectedMachine(kvm, cpus=2)
    machine.start()
    with GdbServer.on_unix_socket(machine, path):
        with connect(path) as client:
            reader = threading.Thread(target=_read_all, args=(client,))
            reader.start()
            with contextlib.suppress(OSError):  # it detached, killed, or was no debugger
                client.sendall(stream)
                client.shutdown(socket.SHUT_WR)
            reader.join(30)
        assert not reader.is_alive()
        with GdbClient(path) as again:
            assert again.ask("qC") == "QC1"
    with contextlib.suppress(UnexpectedExitError):
        machine.close()


def _read_all(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass
