"""What a confined process is refused, by the kernel, and what it can still do."""

import ctypes
import json
import mmap
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import tty
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

import pytest

from pykvm.sandbox import Applied, Confinement, available, enter, landlock
from pykvm.sandbox.policy import number_of
from pykvm.sandbox.system_calls import KILLED
from tests.rigs.confined import DONE, end_of, in_child, in_sandbox, outcomes, system_call

pytestmark = pytest.mark.unit

PASSWD = Path("/etc/passwd")


def test_every_layer_is_there() -> None:
    """On this machine, as on Debian's kernels, or the tests below would show little."""
    assert [str(layer) for layer in available() if not layer.in_force] == []


# ---- files --------------------------------------------------------------------------------------


def reads(path: Path) -> Callable[[], object]:
    return path.read_bytes


def writes(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(b"new")


@pytest.mark.parametrize("abi", range(1, 8))
def test_files_outside(abi: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read but what was named, and nothing is written: by old versions of Landlock too.

    A kernel takes the rules of all versions before its own.
    """
    if landlock.landlock_abi() < abi:
        pytest.skip(f"this kernel has Landlock's ABI {landlock.landlock_abi()}")
    monkeypatch.setattr("pykvm.sandbox.landlock.landlock_abi", lambda: abi)
    mine, named, other = tmp_path / "mine", tmp_path / "named", tmp_path / "other"
    for directory in (mine, named, other):
        directory.mkdir()
        (directory / "file").write_bytes(b"text")
    (mine / "link").symlink_to(other / "file")
    confinement = Confinement(directory=mine, readable=(named,))
    calls = [
        *(reads(PASSWD), reads(other / "file"), reads(mine / "link"), lambda: os.listdir(other)),
        *(reads(Path("/proc/1/status")), lambda: os.listdir("/")),
        *(writes(PASSWD), writes(other / "new"), writes(named / "file"), writes(mine / "link")),
        *(writes(mine / ".." / "other" / "file"), (other / "file").unlink),
        lambda: (mine / "file").rename(other / "moved"),
        (other / "directory").mkdir,
    ]
    # Linux says EXDEV for a file that would be moved out, where both ends are directories.
    found = outcomes(*calls, confinement=confinement)
    assert [one for one in found if one not in ("EACCES", "EXDEV")] == []
    calls = [
        *(lambda: os.truncate(other / "file", 0), lambda: os.chmod(mine / "file", 0o666)),
        *(lambda: os.utime(mine / "file"), lambda: os.chown(mine / "file", 0, 0)),
        *(lambda: os.setxattr(mine / "file", "user.x", b""), lambda: os.mkfifo(mine / "fifo")),
        *(lambda: os.link(other / "file", mine / "hard"), lambda: os.symlink("x", mine / "soft")),
        lambda: os.open(named / "file", os.O_RDONLY | os.O_TRUNC),
        lambda: os.open("/dev/null", 3),
        lambda: os.chmod(sys.executable, 0o777),
    ]
    assert set(outcomes(*calls, confinement=confinement)) == {"EPERM"}
    assert (other / "file").read_bytes() == (named / "file").read_bytes() == b"text"
    assert (named / "file").exists()


def test_files_without_a_directory(tmp_path: Path) -> None:
    """The filter refuses to open files for writing, whatever Landlock says."""
    assert outcomes(writes(tmp_path / "new"), (tmp_path / "new").unlink) == ["EPERM", "EPERM"]
    control = outcomes(writes(tmp_path / "new"), (tmp_path / "new").unlink, sandbox=False)
    assert control == [DONE, DONE]


def test_files_inside(tmp_path: Path) -> None:
    """A directory of its own, from a lock file to its removal, and a folder that is renamed."""
    mine, kept, named = tmp_path / "mine", tmp_path / "kept", tmp_path / "named"
    for directory in (mine, kept):
        directory.mkdir()
    named.write_text("text")

    def body(_: Applied) -> list[str]:
        made = Path(tempfile.mkdtemp(dir=kept))
        with open(made / "file", "wb") as file:
            file.write(b"x" * 4096)
            os.ftruncate(file.fileno(), 1 << 20)
            os.fsync(file.fileno())
        made.rename(kept / "snapshot")
        folder = os.open(kept, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        (mine / "lock").write_text("")
        (mine / "lock").unlink()
        mine.rmdir()
        return [named.read_text(), Path("/proc/self/status").read_text().splitlines()[0]]

    confinement = Confinement(directory=mine, writable=(kept,), readable=(named,))
    said, name = in_sandbox(body, confinement)
    assert said == "text"
    assert name.startswith("Name:")
    assert (kept / "snapshot" / "file").stat().st_size == 1 << 20
    assert not mine.exists()


def test_what_is_passed_on(tmp_path: Path) -> None:
    """A descriptor that a client of a listening socket sends is written to, wherever it is."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "socket"))
    with open(tmp_path / "file", "wb") as file:
        socket.send_fds(client, [b"here"], [file.fileno()])

    def body(_: Applied) -> bytes:
        listener.settimeout(20)
        connection, _address = listener.accept()
        connection.settimeout(20)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert struct.unpack("3i", credentials)[1] == os.getuid()
        said, descriptors, _flags, _address = socket.recv_fds(connection, 100, 1)
        os.write(descriptors[0], b"written")
        os.truncate(descriptors[0], 4)
        connection.sendall(b"done")
        connection.shutdown(socket.SHUT_RDWR)
        return said

    assert in_sandbox(body) == b"here"
    assert (tmp_path / "file").read_bytes() == b"writ"
    assert client.recv(10) == b"done"
    listener.close()
    client.close()


# ---- processes ----------------------------------------------------------------------------------


def test_processes() -> None:
    calls: list[Callable[[], object]] = [
        os.fork,
        lambda: subprocess.run(["true"], check=True),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.kill(0, 0),
        lambda: os.pidfd_open(os.getppid()),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 10),
        lambda: os.sched_setaffinity(os.getppid(), {0}),
        lambda: system_call(number_of("prctl"), 22, 2, 0),  # PR_SET_SECCOMP
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    ]
    assert outcomes(*calls) == ["EPERM"] * len(calls)
    assert outcomes(*calls[1:4], calls[-1], sandbox=False) == [DONE] * 4


@pytest.mark.parametrize("call", [call for call in KILLED if number_of(call) >= 0])
def test_calls_that_end_the_process(call: str) -> None:
    """Even before their arguments are looked at."""
    assert end_of(lambda: system_call(number_of(call), -1, -1, -1, -1)) == "SIGSYS"


def test_an_execution_ends_the_process() -> None:
    assert end_of(lambda: os.execv("/bin/true", ["true"])) == "SIGSYS"


def test_system_calls_of_x32() -> None:
    assert end_of(lambda: system_call(0x40000000 | number_of("getpid"))) == "SIGSYS"


def test_system_calls_of_i386() -> None:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("53 B814000000 CD80 5B C3"))  # push rbx; getpid(); pop rbx; ret
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    call = ctypes.CFUNCTYPE(ctypes.c_int)(at)
    if end_of(call, sandbox=False):
        pytest.skip("this kernel has no system calls of i386")
    assert end_of(call) == "SIGSYS"


def test_signals_to_children(tmp_path: Path) -> None:
    """Those that were named, and those that there is a descriptor of."""

    def body() -> list[str]:
        children = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
        process = os.pidfd_open(children[1].pid)
        enter(Confinement(children=(children[0].pid,)))
        children[0].terminate()
        signal.pidfd_send_signal(process, signal.SIGKILL)
        try:
            children[2].kill()
        except PermissionError:
            refused = True
        statuses = [str(child.wait()) for child in children[:2]]
        return [*statuses, str(refused), str(children[2].pid)]

    first, second, refused, left = in_child(body)
    os.kill(int(left), signal.SIGKILL)
    assert [first, second, refused] == ["-15", "-9", "True"]


# ---- sockets and terminals ----------------------------------------------------------------------


def test_sockets() -> None:
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40)
    calls = [lambda family=family: socket.socket(family, socket.SOCK_DGRAM) for family in families]
    assert outcomes(*calls, socket.socketpair) == ["EPERM"] * 6


def test_sockets_of_a_family(tmp_path: Path) -> None:
    """By paths, but not to abstract addresses outside (since ABI 6), and to no other family."""
    outside = socket.socket(socket.AF_UNIX)
    outside.bind("")  # the kernel chooses an abstract address
    outside.listen(1)
    address = outside.getsockname()
    assert outcomes(lambda: socket.socket(socket.AF_UNIX).connect(address), sandbox=False) == [DONE]

    def listens() -> None:
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(tmp_path / "socket"))
        made.listen(1)
        socket.socket(socket.AF_UNIX).connect(str(tmp_path / "socket"))

    unix = Confinement(directory=tmp_path, families=(socket.AF_UNIX,))
    calls = (listens, lambda: socket.socket(socket.AF_UNIX).connect(address), socket.socket)
    abstract = "EPERM" if landlock.landlock_abi() >= 6 else DONE
    assert outcomes(*calls, confinement=unix) == [DONE, abstract, "EPERM"]
    outside.close()


def test_a_terminal() -> None:
    """Its settings may change; nothing can be typed into it."""
    keyboard, terminal = pty.openpty()

    def body(_: Applied) -> bool:
        before = termios.tcgetattr(terminal)
        tty.setraw(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        assert os.isatty(terminal)
        os.get_terminal_size(terminal)
        try:
            ioctl(terminal, termios.TIOCSTI, b"x")
        except PermissionError:
            return termios.tcgetattr(terminal) == before
        return False

    assert in_sandbox(body)
    os.close(keyboard)
    os.close(terminal)


# ---- a monitor's daily life ---------------------------------------------------------------------


def test_threads_and_waiting() -> None:
    def body(_: Applied) -> list[str]:
        said = []
        event, poll = os.eventfd(0, os.EFD_CLOEXEC), select.epoll()
        poll.register(event, select.EPOLLIN)

        def wait() -> None:
            poll.poll(20)
            said.append(f"eventfd {os.eventfd_read(event)}")
            selected, _, _ = select.select([event], [], [], 0.01)
            said.append(f"select {selected}")

        thread = threading.Thread(target=wait)
        thread.start()
        os.eventfd_write(event, 3)
        thread.join(20)
        memory = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(memory, 1 << 20)
        with mmap.mmap(memory, 1 << 20) as view:
            view[:4] = b"text"
            view.madvise(mmap.MADV_DONTNEED)
        os.posix_fallocate(memory, 0, 1 << 21)
        said.append(os.pread(memory, 4, 0).decode())
        signal.signal(signal.SIGUSR1, lambda *_: said.append("signal"))
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        import wave  # noqa: F401, PLC0415  (nothing else has imported it)

        said.append(json.dumps({"python": sys.version_info.major}))
        return said

    assert in_sandbox(body) == [
        *("eventfd 3", "select []", "text", "signal", "signal", '{"python": 3}'),
    ]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that has imported nothing yet."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_an_exception_is_reported() -> None:
    """With its source lines, which are read then."""
    done = run(
        "from pykvm.sandbox import *\n"
        "enter(Confinement())\n"
        "import fractions\n"
        "fractions.Fraction(1, 0)\n"
    )
    assert "raise ZeroDivisionError('Fraction(%s, 0)' % numerator)" in done.stderr, done.stderr
    assert done.returncode == 1


def test_modules_are_imported_later() -> None:
    """All of pykvm's, whatever they import."""
    done = run(
        "import importlib, pkgutil\n"
        "from pykvm.sandbox import *\n"
        "enter(Confinement())\n"
        "import pykvm, hashlib, ssl, sqlite3, multiprocessing.shared_memory, ctypes.util\n"
        "from pykvm.version import version\n"
        "names = [one.name for one in pkgutil.walk_packages(pykvm.__path__, 'pykvm.')]\n"
        "for name in names:\n"
        "    if not name.rpartition('.')[2].startswith(('build_', '__main__')):\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except ModuleNotFoundError as error:  # of an extra\n"
        "            assert not error.name.startswith('pykvm')\n"
        "print(len(names), version(), hashlib.sha256(b'').hexdigest()[:8])\n"
    )
    assert done.returncode == 0, done.stderr
    number, version, digest = done.stdout.split()
    assert int(number) > 200
    assert version[0].isdigit()
    assert digest == "e3b0c442"


def test_a_snapshot_is_written(tmp_path: Path) -> None:
    done = run(
        "import sys\n"
        "from pathlib import Path\n"
        "from pykvm.memory.guest_memory import GuestMemory\n"
        "from pykvm.sandbox import *\n"
        "place = Path(sys.argv[1])\n"
        "with GuestMemory.create(4 << 20, shareable=True) as memory:\n"
        "    memory.write(1 << 20, b'text')\n"
        "    enter(Confinement(writable=(place,)))\n"
        "    from pykvm.snapshot.folder import Contents\n"
        "    from pykvm.snapshot.folder_writer import write_snapshot\n"
        "    write_snapshot(place / 'saved', Contents({}, {}, {}, blobs={'a': b'b'}), memory)\n",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    made = sorted(one.name for one in (tmp_path / "saved").iterdir())
    assert made == ["a", "manifest.json", "manifest.sha256", "memory"]
