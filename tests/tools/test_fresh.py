"""`make fresh`: what it carries in, and that nothing remains, however it ends.

The system here is a shell and `sleep` in place of a Debian; everything else is real.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.fresh import machine, mirrors, system
from tools.fresh.__main__ import main

pytestmark = pytest.mark.unit

_needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="a root file system of its own: needs root"
)
_PROGRAMS = ("sh", "sleep")
_FRESH = (
    "import sys; from pathlib import Path; from tools.fresh import system; "
    "from tools.fresh.__main__ import main; "
    "system.base = lambda debian, tell: Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archive of a system with a shell, `sleep`, and what `make fresh` expects of a Debian."""
    top = tmp_path_factory.mktemp("fresh")
    tree = top / "tree"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "usr/sbin"):
        (tree / name).mkdir(parents=True)
    for name in _PROGRAMS:
        program = shutil.which(name)
        assert program is not None
        shutil.copy(program, tree / "bin" / name)
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        for word in listed.stdout.split():
            if word.startswith("/"):
                library = tree / word[1:]
                library.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, library)
    for name in ("bin/bash", "usr/sbin/update-ca-certificates"):
        (tree / name).write_text("#!/bin/sh\n[ -t 0 ] || while read -r line; do eval $line; done\n")
        (tree / name).chmod(0o755)
    subprocess.run(["tar", "-C", tree, "-cf", top / "root.tar", "."], check=True)
    return top / "root.tar"


@pytest.fixture
def nap() -> str:
    """A number of seconds that no other process sleeps."""
    return str(random.randrange(10**5, 10**6))


@pytest.fixture
def root(archive: Path, tmp_path: Path) -> Path:
    system.unpack(archive, tmp_path / "root")
    return tmp_path / "root"


@contextmanager
def _started(archive: Path, cache: Path, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        [sys.executable, "-c", _FRESH, str(archive), *arguments],
        cwd=system.CHECKOUT,
        env={**os.environ, "PYKVM_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _await_output(process: "subprocess.Popen[str]", wanted: str) -> None:
    assert process.stdout is not None
    assert any(line == f"{wanted}\n" for line in process.stdout)


def _await_count(marker: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(_running(marker)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(_running(marker)) == count


def _running(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in words:
            found.append(path.parent.name)
    return found


def _machines(cache: Path) -> list[Path]:
    return list((cache / "fresh-machines").iterdir())


@_needs_root
def test_status_and_environment(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert machine.run(root, "exit 7") == 7
    assert machine.run(root, "kill -9 $$") == 128 + signal.SIGKILL
    assert machine.run(root, "echo $$ $HOME $A $PWD", environment={"A": "b"}) == 0
    first, *rest = capfd.readouterr().out.split()
    assert int(first) > 1  # orphans belong to init
    assert rest == ["/root", "b", "/root"]


@_needs_root
def test_devices_and_mounts(root: Path) -> None:
    before = Path("/proc/self/mounts").read_text()
    kvm = "-c" if os.path.exists("/dev/kvm") else "! -e"
    tests = ["-c /dev/null", "-d /dev/shm", "-c /dev/ptmx", "-e /proc/self", f"{kvm} /dev/kvm"]
    for test in (*tests, "-d /sys/kernel"):
        assert machine.run(root, f"test {test} && echo >/dev/null") == 0, test
    assert Path("/proc/self/mounts").read_text() == before
    assert list((root / "proc").iterdir()) == list((root / "dev").iterdir()) == []


@_needs_root
def test_its_root_is_a_mount_point(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert machine.run(root, "while read -r line; do echo $line; done </proc/self/mountinfo") == 0
    targets = [line.split()[4] for line in capfd.readouterr().out.splitlines()]
    assert targets[0] == "/", "a mount point, and nothing of the host above it"
    assert targets.count("/") == 1


@_needs_root
def test_processes_end_with_their_command(root: Path, nap: str) -> None:
    assert machine.run(root, f"sleep {nap} & sleep {nap} & exit 3") == 3
    assert _running(nap) == []


@_needs_root
def test_every_command_has_its_line(archive: Path, tmp_path: Path) -> None:
    with _started(archive, tmp_path, "--debian", "13", "--run", "true && exit 4 && true") as fresh:
        output, _ = fresh.communicate(timeout=120)
    assert fresh.returncode == 1, output
    *_, first, second, third = output.splitlines()
    assert first.startswith("fresh Debian 13: [")
    assert first.endswith(" s: true")
    assert "] status 0, " in first
    assert "] status 4, " in second
    assert third.endswith("] not run: true")
    assert _machines(tmp_path) == []


@_needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(
    archive: Path, tmp_path: Path, nap: str, number: int
) -> None:
    before = Path("/proc/self/mounts").read_text()
    commands = f"sleep {nap} & echo ready; sleep {nap}"
    with _started(archive, tmp_path, "--run", commands) as fresh:
        _await_output(fresh, "ready")
        _await_count(nap, 2)
        assert _machines(tmp_path)
        fresh.send_signal(number)
        output, _ = fresh.communicate(timeout=60)
    assert fresh.returncode == (130 if number == signal.SIGINT else 128 + number), output
    assert _running(nap) == []
    assert _machines(tmp_path) == []
    assert Path("/proc/self/mounts").read_text() == before


@_needs_root
def test_nothing_runs_after_a_kill(archive: Path, tmp_path: Path, nap: str) -> None:
    with _started(archive, tmp_path, "--run", f"sleep {nap}") as fresh:
        _await_count(nap, 1)
        fresh.kill()
    _await_count(nap, 0)
    (left,) = _machines(tmp_path)
    os.utime(left, (0, 0))
    with _started(archive, tmp_path, "--run", "true") as fresh:  # removes the remains
        fresh.communicate(timeout=60)
    assert _machines(tmp_path) == []


@_needs_root
def test_a_kept_system_can_be_entered(archive: Path, tmp_path: Path) -> None:
    with _started(archive, tmp_path, "--keep", "--run", "echo >/root/trace") as fresh:
        output, _ = fresh.communicate(timeout=60)
    assert fresh.returncode == 0, output
    (kept,) = (tmp_path / "fresh-kept").iterdir()
    assert f"--enter {kept}\n" in output
    assert (kept / "root/trace").exists()
    with _started(archive, tmp_path, "--enter", str(kept)) as shell:
        output, _ = shell.communicate("echo $PWD; exit 5\n", timeout=60)
    assert (shell.returncode, output) == (5, "/root/pykvm\n")


def test_only_root_makes_a_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([]) == 1
    assert capsys.readouterr().err.endswith("type: sudo make fresh\n")


@pytest.mark.parametrize("arguments", [["--run", " && "], ["--debian", "11"], ["--run"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2


def test_pip_keeps_what_concerns_the_network(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://one.example/simple\nfind-links = /wheels\n"
        "constraint = /c.txt\nretries = 9\n[install]\nuser = true\n"
        "extra-index-url = file:///wheels https://two.example/simple\n"
    )
    variables = {"PIP_CERT": "/ca.pem", "PIP_USER": "1", "PIP_RETRIES": "3", "CERT": "/other"}
    assert mirrors.pip_settings(variables, [file, tmp_path / "none"]) == {
        "index-url": "https://one.example/simple",
        "extra-index-url": "https://two.example/simple",
        "cert": "/ca.pem",
        "retries": "3",
    }
    assert mirrors.pip_settings({"PIP_EXTRA_INDEX_URL": "file:///wheels"}, [file]).keys() == {
        "index-url",
        "retries",
    }


def test_proxies_and_certificates_are_carried() -> None:
    variables = {"https_proxy": "http://p:1", "NO_PROXY": "a", "SSL_CERT_FILE": "/c", "HOME": "/h"}
    assert mirrors.environment({**variables, "http_proxy": ""}) == {
        name: value for name, value in variables.items() if name != "HOME"
    }


def _fake_apt(directory: Path, program: str, output: str) -> None:
    path = directory / program
    path.write_text(f"#!/bin/sh\ncat <<'E'\n{output}E\n")
    path.chmod(0o755)


def test_mirror_is_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    near, security = "http://near.example/debian/", "http://safe.example/debian-security/"
    lines = f"Debian Debian {near}\nNode Node https://node.example/\n"
    main = [f"deb {near} trixie main", f"deb {near} trixie-updates main"]
    _fake_apt(tmp_path, "apt-get", lines)
    assert mirrors.sources("trixie") == main
    _fake_apt(tmp_path, "apt-get", f"{lines}Debian Debian-Security {security}\n")
    assert mirrors.sources("trixie") == [*main, f"deb {security} trixie-security main"]
    _fake_apt(tmp_path, "apt-get", "Node Node https://node.example/\n")
    with pytest.raises(mirrors.MirrorError, match="no archive of Debian"):
        mirrors.sources("trixie")


def test_apt_keeps_what_concerns_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    kept = ['Acquire::http::Proxy "http://p:1";', 'Acquire::Check-Date "false";']
    other = ['APT::Architecture "amd64";', 'Acquire::Languages "none";', 'Dir::Cache "x";']
    _fake_apt(tmp_path, "apt-config", "".join(f"{line}\n" for line in (*kept, *other)))
    assert mirrors.apt_options() == kept


def test_certificates_are_carried_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = tmp_path / "own.pem"
    authority.write_text("certificate")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    mirrors.carry_in(root, {"SSL_CERT_FILE": str(authority), "PIP_CERT": "/none.pem"})
    assert (root / authority.relative_to("/")).read_text() == "certificate"
    assert "cert = /none.pem" in (root / "etc/pip.conf").read_text()
    assert (root / "etc/resolv.conf").read_bytes() == Path("/etc/resolv.conf").read_bytes()
