"""A machine in a process of its own, asked by the commands that a user types."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pykvm.control.client import ControlError, MachineClient
from pykvm.control.directory import MachineNameError, names_of_running
from tests.rigs.multiboot_image import image_32
from tests.rigs.waiting import wait_for

# Each command takes ten seconds to start on an emulated host.
pytestmark = [pytest.mark.kvm, pytest.mark.native]

PYKVM = [sys.executable, "-m", "pykvm"]


def pykvm(*words: str, given: str = "", status: int = 0) -> str:
    """Run a command; return what it prints, on standard error where it fails."""
    done = subprocess.run(
        [*PYKVM, *words], input=given, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@dataclass
class Running:
    """A machine named lab, which sends back what it is sent, and ends with 43 after a q."""

    process: subprocess.Popen[bytes]
    output: Path

    def type(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def shows(self, data: bytes) -> None:
        wait_for(lambda: data in self.output.read_bytes())


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def start(directory: Path, *words: str, shows: bytes = b"listening\n") -> Running:
    output = directory / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*PYKVM, *words], stdin=subprocess.PIPE, stdout=file, stderr=file
        )
    running = Running(process, output)
    wait_for(lambda: shows in output.read_bytes() or process.poll() is not None)
    assert process.poll() is None, output.read_text()
    return running


def end(running: Running) -> None:
    running.process.kill()
    running.process.wait()
    assert running.process.stdin
    running.process.stdin.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(image_32())
    return path


@pytest.fixture
def lab(image: Path, tmp_path: Path) -> Iterator[Running]:
    options = ["--kernel", str(image), "--append", "say echo 21", "--memory", "64M"]
    options += ["--name", "lab", "--snapshots", str(tmp_path)]
    running = start(tmp_path, "run", *options)
    yield running
    end(running)


def test_it_is_listed_until_it_ends(lab: Running, image: Path) -> None:
    heading, line = pykvm("ps").splitlines()
    assert heading.split() == ["NAME", "STATE", "CPUS", "MEMORY", "FOR", "PID", "KERNEL"]
    assert line.split()[:5] == ["lab", "running", "1", "64", "MiB"]
    (found,) = json.loads(pykvm("ps", "--json"))
    assert line.split()[6:] == [str(found["pid"]), str(image)]
    assert psutil.Process(found["pid"]).ppid() == lab.process.pid
    lab.type(b"xyz")
    lab.shows(b"listening\nxyz")
    lab.type(b"q")
    assert lab.process.wait(60) == 43
    assert names_of_running() == []
    assert pykvm("ps").count("\n") == 1


def test_it_stands_still_and_runs_on(lab: Running) -> None:
    pykvm("pause", "lab")
    pykvm("pause", "lab")
    assert "paused" in pykvm("ps")
    lab.type(b"late")
    time.sleep(0.5)
    assert b"late" not in lab.output.read_bytes()
    pykvm("resume", "lab")
    lab.shows(b"late")
    pykvm("stop", "lab")
    assert lab.process.wait(60) == 0
    assert "no machine lab is running" in pykvm("stop", "lab", status=1)


def test_a_second_console(lab: Running) -> None:
    """It shows what was there, takes keys, and its end ends nothing."""
    reader, writer = os.pipe()
    shown = lab.output.with_name("shown")
    with shown.open("wb") as file:
        console = subprocess.Popen([*PYKVM, "console", "lab"], stdin=reader, stdout=file)
    os.close(reader)
    wait_for(lambda: b"listening\n" in shown.read_bytes())
    os.write(writer, b"typed there")
    lab.shows(b"typed there")
    wait_for(lambda: b"typed there" in shown.read_bytes())
    console.terminate()
    console.wait()
    os.close(writer)
    lab.type(b"here")
    lab.shows(b"here")


def test_consoles_that_do_not_read(lab: Running) -> None:
    """A machine waits for none of them, and has four at most."""
    clients = [MachineClient("lab") for _ in range(5)]
    shown = []
    for client in clients:
        connection, first = client.stream("console")
        connection.settimeout(0.05)
        shown.append((connection, bytearray(first)))

    def one_is_too_many() -> bool:
        for connection, text in shown:
            with suppress(TimeoutError):
                text.extend(connection.recv(10000))
        return any(b"four consoles already" in text for _, text in shown)

    wait_for(one_is_too_many)
    lab.type(b"x" * 1000)
    lab.shows(b"x" * 1000)
    lab.type(b"q")
    assert lab.process.wait(60) == 43
    for client in clients:
        client.close()


def test_what_it_does(lab: Running) -> None:
    report = pykvm("report", "lab")
    assert "rip" in report.lower()
    walk = pykvm("walk", "lab", "0x100000")
    assert "GPA 0x100000" in walk
    assert "no processor 3: use 0 to 0" in pykvm("walk", "lab", "0", "--cpu", "3", status=1)
    assert "is no address" in pykvm("walk", "lab", "nowhere", status=1)
    target = pykvm("gdb", "--print", "lab")
    assert re.fullmatch(r"target remote .*/lab/gdb\n", target)
    assert pykvm("gdb", "--print", "lab") == target
    with MachineClient("lab") as client:
        counts = client.request("metrics")
        assert counts["vcpus"][0]["runs"] > 0
        text = client.request("metrics", format="prometheus")
    assert 'pykvm_vcpu_runs_total{machine="lab",vcpu="0"}' in text
    lab.type(b"goes on")
    lab.shows(b"goes on")


def test_saved_and_restored(lab: Running, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    said = pykvm("snapshot", "lab", str(folder))
    assert f"MiB of memory; to go on: pykvm restore {folder}" in said
    lab.type(b"the first goes on")
    lab.shows(b"the first goes on")
    assert "is there already" in pykvm("snapshot", "lab", str(folder), status=1)
    (tmp_path / "second").mkdir()
    (tmp_path / "second/output").touch()
    with (tmp_path / "second/output").open("wb") as file:
        process = subprocess.Popen(
            [*PYKVM, "restore", str(folder), "--name", "second"], stdin=subprocess.PIPE, stdout=file
        )
    second = Running(process, tmp_path / "second/output")
    second.type(b"so does the second")
    second.shows(b"so does the second")
    assert names_of_running() == ["lab", "second"]
    second.type(b"q")
    assert process.wait(60) == 43
    assert process.stdin
    process.stdin.close()


def test_names(lab: Running, image: Path, tmp_path: Path) -> None:
    options = ["--kernel", str(image), "--memory", "64M", "--append", "say 0"]
    said = pykvm("run", *options, "--name", "lab", status=1)
    assert "a machine lab is running: choose another --name" in said
    assert "is no name of a machine" in pykvm("run", *options, "--name", "a/b", status=1)
    (tmp_path / "vm.toml").write_text(
        'kernel = "image"\nmemory = "64M"\nappend = "say 3"\nname = "other"\n'
    )
    done = subprocess.run(
        [*PYKVM, "run", str(tmp_path / "vm.toml")], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 7


def test_a_killed_machine(lab: Running) -> None:
    with MachineClient("lab") as client:
        assert client.request("status")
        lab.process.kill()
        lab.process.wait()
        wait_for(lambda: names_of_running() == [])
        with pytest.raises(ControlError, match="has ended"):
            client.request("status")
    with pytest.raises(MachineNameError):
        MachineClient("lab")


def test_a_confined_machine_writes_nowhere_else(lab: Running, tmp_path: Path) -> None:
    """Of /proc: no new privileges, a filter of system calls, and no capabilities."""
    (found,) = json.loads(pykvm("ps", "--json"))
    status = Path(f"/proc/{found['pid']}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert "CapEff:\t0000000000000000" in status
    pykvm("snapshot", "lab", str(tmp_path / "inside"))
    outside = Path(tempfile.mkdtemp())
    try:
        said = pykvm("snapshot", "lab", str(outside / "there"), status=1)
        assert "--snapshots" in said
    finally:
        shutil.rmtree(outside)
    pykvm("stop", "lab")
    assert lab.process.wait(60) == 0
