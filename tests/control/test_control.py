"""Names, sockets and requests of running machines, and clients that do not keep the rules."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pykvm.control import server as control_server
from pykvm.control.client import ControlError, MachineClient
from pykvm.control.directory import (
    MachineDirectory,
    MachineNameError,
    RuntimeDirectoryError,
    names_of_running,
    runtime_root,
)
from pykvm.control.server import LONGEST_LINE, MOST_CLIENTS, ControlServer, Session, Stream
from pykvm.errors import PykvmError
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "pykvm"


def refuse(request: Mapping[str, Any]) -> None:
    raise PykvmError("it is paused already", "pykvm resume")


def echo(session: Session) -> None:
    while data := session.socket.recv(100):
        session.socket.sendall(data.upper())


@pytest.fixture
def machine() -> Iterator[MachineDirectory]:
    handlers = {
        "status": lambda request: {"state": "running", **request},
        "number": lambda request: int(request["value"]),
        "refuse": refuse,
        "console": lambda request: Stream(echo),
    }
    with MachineDirectory("lab") as directory, ControlServer(directory.socket, handlers):
        yield directory


def test_names() -> None:
    with MachineDirectory("b") as second, MachineDirectory() as first, MachineDirectory() as third:
        assert [one.name for one in (first, second, third)] == ["vm1", "b", "vm2"]
        assert names_of_running() == ["b", "vm1", "vm2"]
        with pytest.raises(MachineNameError, match="a machine b is running: choose another --name"):
            MachineDirectory("b")
        second.close()
        second.close()
        assert names_of_running() == ["vm1", "vm2"]
    assert names_of_running() == []


@pytest.mark.parametrize("name", ["", "-x", "a/b", "..", "a" * 49, "a b", "a\n"])
def test_words_that_are_no_names(name: str) -> None:
    with pytest.raises(MachineNameError, match="is no name of a machine"):
        MachineDirectory(name)
    with pytest.raises(MachineNameError, match="is no name of a machine"):
        MachineClient(name)


def test_a_killed_machine_leaves_its_name(root: Path) -> None:
    code = (
        "import os, signal; from pykvm.control.directory import MachineDirectory;"
        "d = MachineDirectory('lab'); d.socket.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (root / "lab/control").exists()
    with MachineDirectory("lab") as directory:
        assert not directory.socket.exists()
    subprocess.run([sys.executable, "-c", code], check=False)
    assert names_of_running() == []
    assert not (root / "lab").exists()


def test_a_directory_that_others_may_change(root: Path) -> None:
    runtime_root()
    root.chmod(0o755)
    with pytest.raises(RuntimeDirectoryError, match="not this user's alone: remove it, or type"):
        runtime_root()
    root.rmdir()
    root.symlink_to("/tmp")
    with pytest.raises(RuntimeDirectoryError, match="not this user's alone"):
        runtime_root()


def test_a_path_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(RuntimeDirectoryError, match="too long for the name of a socket"):
        MachineDirectory("lab")
    assert names_of_running() == []


def test_requests(machine: MachineDirectory) -> None:
    assert machine.socket.stat().st_mode & 0o077 == 0
    with MachineClient("lab") as client:
        assert client.request("status", more=[1]) == {"state": "running", "more": [1]}
        assert client.request("number", value="7") == 7
        with pytest.raises(ControlError, match="it is paused already: pykvm resume"):
            client.request("refuse")
        with pytest.raises(ControlError, match="argument is missing or wrong"):
            client.request("number")
        with pytest.raises(ControlError, match="no command 'fly': use status, number"):
            client.request("fly")
        assert client.request("status") == {"state": "running"}


def test_a_stream(machine: MachineDirectory) -> None:
    with MachineClient("lab") as client:
        connection, first = client.stream("console")
        assert first == b""
        connection.sendall(b"abc")
        assert connection.recv(10) == b"ABC"
    with MachineClient("lab") as client, pytest.raises(ControlError, match="is no stream"):
        client.stream("status")


def test_no_machine_of_the_name(machine: MachineDirectory) -> None:
    with pytest.raises(MachineNameError, match="no machine x is running: running: lab"):
        MachineClient("x")
    machine.close()
    with pytest.raises(MachineNameError, match="none is running: pykvm run"):
        MachineClient("lab")


def raw(machine: MachineDirectory, data: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(machine.socket))
        client.sendall(data)
        answer: dict[str, Any] = json.loads(client.makefile().readline())
        return answer


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"\xff\xfe\n", "no JSON"),
        (b"\n", "no JSON"),
        (b"[" * 60000 + b"\n", "no JSON"),
        (b"[1]\n", "without a command"),
        (b'{"command": 3}\n', "without a command"),
        (b"x" * (LONGEST_LINE + 1), "more than 64 KiB"),
    ],
)
def test_rubbish(machine: MachineDirectory, sent: bytes, problem: str) -> None:
    assert problem in raw(machine, sent)["problem"]
    with MachineClient("lab") as client:
        assert client.request("status")


def test_a_client_that_dribbles(machine: MachineDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no request: the time is for the whole line."""
    monkeypatch.setattr(control_server, "_PATIENCE", 0.5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.socket))

        def refused() -> bool:
            time.sleep(0.05)
            try:
                client.sendall(b"x")
            except BrokenPipeError:
                return True
            return False

        wait_for(refused)


def test_arguments_of_another_kind(machine: MachineDirectory) -> None:
    with MachineClient("lab") as client:
        values: list[Any] = [float("inf"), {}, None]
        for value in values:
            with pytest.raises(ControlError, match="argument is missing or wrong"):
                client.request("number", value=value)
        assert client.request("status") == {"state": "running"}


def test_clients_that_say_nothing(
    machine: MachineDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are dropped after a while, and while they are too many, the next one is."""
    monkeypatch.setattr(control_server, "_PATIENCE", 0.5)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(MOST_CLIENTS + 1)]
    for one in silent:
        one.settimeout(20)
        one.connect(str(machine.socket))
    for one in silent:
        assert one.recv(1) == b""
        one.close()
    with MachineClient("lab") as client:
        assert client.request("status")


def test_a_machine_ends_under_its_clients() -> None:
    handlers = {"status": lambda request: None, "console": lambda request: Stream(echo)}
    with MachineDirectory("lab") as directory:
        server = ControlServer(directory.socket, handlers)
        client = MachineClient("lab")
        client.request("status")
        other = MachineClient("lab")
        connection, _ = other.stream("console")
        server.close()
        server.close()
        assert connection.recv(1) == b""
        with pytest.raises(ControlError, match="has ended"):
            client.request("status")
        client.close()
        other.close()
    assert not any(thread.name == "control" for thread in threading.enumerate())
    assert os.listdir(runtime_root()) == []
