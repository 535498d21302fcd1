"""pykvm.devices.virtio.fs: a guest's requests to a real virtiofsd."""

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio import fs
from pykvm.devices.virtio.backend_process import BackendMissingError
from pykvm.devices.virtio.device import DeviceType
from pykvm.devices.virtio.fs import ShareError, VirtioFs, Virtiofsd, find_virtiofsd
from pykvm.devices.virtio.vhost_user_connection import BackendError, BackendGoneError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.device_failures import failures_of
from tests.rigs.forks import in_fork
from tests.rigs.fuse_session import FuseSession
from tests.rigs.virtio_driver import VirtioDriver

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


@pytest.fixture
def driver() -> Iterator[VirtioDriver]:
    with (
        GuestMemory.create(4 * MIB, shareable=True) as memory,
        VirtioDriver([64, 64], memory=memory) as made,
    ):
        yield made


@pytest.fixture
def virtiofsd() -> Virtiofsd:
    try:
        return find_virtiofsd()
    except BackendMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "a, \\ b"
    (directory / "sub").mkdir(parents=True)
    (directory / "hello").write_text("hello from the host\n")
    (directory / "sub" / "secret").write_text("x" * 5000)
    (directory / "away").symlink_to("/etc/hostname")
    return directory


def test_a_directory_read_only(driver: VirtioDriver, virtiofsd: Virtiofsd, shared: Path) -> None:
    with VirtioFs("root", shared, driver.memory) as device:
        assert device.type is DeviceType.FS
        assert device.config() == b"root".ljust(36, b"\0") + b"\1\0\0\0"
        driver.start(device)
        session = FuseSession(driver)
        assert session.version[0] == 7
        assert session.lookup("hello").size == 20
        assert session.read("hello") == b"hello from the host\n"
        assert session.read("sub/secret", 100, 4990) == b"x" * 10
        with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
            session.lookup("none")
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            session.write("hello", b"HELLO")
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            session.mkdir("", "new")
        assert (shared / "hello").read_text() == "hello from the host\n"
        (shared / "later").write_text("later")
        assert session.read("later") == b"later"
        driver.stop(device)


def test_a_directory_to_write_to(driver: VirtioDriver, virtiofsd: Virtiofsd, shared: Path) -> None:
    with VirtioFs("data", shared, driver.memory, read_only=False) as device:
        driver.start(device)
        session = FuseSession(driver)
        session.write("hello", b"HELLO")
        session.mkdir("sub", "new")
        assert (shared / "hello").read_text() == "HELLO from the host\n"
        assert (shared / "sub" / "new").is_dir()


def test_the_root_of_the_host(driver: VirtioDriver, virtiofsd: Virtiofsd) -> None:
    with VirtioFs("root", Path("/"), driver.memory) as device:
        driver.start(device)
        session = FuseSession(driver)
        assert session.read("etc/passwd", 1 << 16) == Path("/etc/passwd").read_bytes()
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            session.mkdir("tmp", "from-a-guest")


def test_an_ordinary_user(virtiofsd: Virtiofsd) -> None:
    """A user without privileges, but with groups, can share what it can read."""
    namespaces = Path("/proc/sys/user/max_user_namespaces")
    if not virtiofsd.rust and not int(namespaces.read_text()):
        pytest.skip("this host does not allow user namespaces, which QEMU's virtiofsd needs")
    if os.geteuid():
        pytest.skip(
            "this host does not allow a change of user: the other tests are an ordinary user's"
        )

    def session() -> None:
        os.setgroups([4, 24])
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as a program of this user is
        os.environ["TMPDIR"] = "/tmp"
        with (
            GuestMemory.create(4 * MIB, shareable=True) as memory,
            VirtioDriver([64, 64], memory=memory) as driver,
            VirtioFs("root", Path("/"), memory) as device,
        ):
            driver.start(device)
            session = FuseSession(driver)
            assert session.read("etc/passwd", 1 << 16) == Path("/etc/passwd").read_bytes()
            owner = session.lookup("etc/passwd").uid
            assert owner == (0 if virtiofsd.rust else 65534)
            with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
                session.read("etc/shadow")
            with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                session.mkdir("tmp", "from-a-guest")

    in_fork(session)


def test_a_second_boot(driver: VirtioDriver, virtiofsd: Virtiofsd, shared: Path) -> None:
    """A guest that has reset its device finds it as it was; one that was stopped goes on."""
    with VirtioFs("root", shared, driver.memory) as device:
        driver.start(device)
        session = FuseSession(driver)
        driver.stop(device)
        driver.start(device)
        assert session.read("hello", 5) == b"hello"
        device.stop()
        with VirtioDriver([64, 64], memory=driver.memory, at=2 * MIB) as second:
            second.start(device)
            assert FuseSession(second).read("hello", 5) == b"hello"


def test_a_killed_virtiofsd(driver: VirtioDriver, virtiofsd: Virtiofsd, shared: Path) -> None:
    with VirtioFs("root", shared, driver.memory) as device:
        failure = failures_of(device)
        driver.start(device)
        FuseSession(driver)
        os.kill(device.pid, signal.SIGKILL)
        assert failure()[-1] == f"virtiofsd of {shared} was ended by signal 9 (Killed)"
        assert device.stop() == {}
        with pytest.raises(BackendError, match="was ended by signal 9"):
            driver.start(device)


def test_it_ends_with_its_device(driver: VirtioDriver, shared: Path, virtiofsd: Virtiofsd) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    device = VirtioFs("root", shared, driver.memory)
    pid = device.pid
    device.close()
    device.close()
    assert not Path(f"/proc/{pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


def test_it_ends_with_a_killed_monitor(shared: Path, virtiofsd: Virtiofsd) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from pykvm.devices.virtio.fs import VirtioFs\n"
        "from pykvm.memory.guest_memory import GuestMemory\n"
        "memory = GuestMemory.create(1 << 20, shareable=True)\n"
        "device = VirtioFs('root', pathlib.Path(sys.argv[1]), memory)\n"
        "print(device.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, shared], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as monitor:
        assert monitor.stdout is not None
        process = os.pidfd_open(int(monitor.stdout.readline()))
        monitor.kill()
    assert select.select([process], [], [], 10)[0]  # readable once it has ended
    os.close(process)


def test_a_virtiofsd_that_cannot_serve(
    driver: VirtioDriver, virtiofsd: Virtiofsd, shared: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "virtiofsd"
    broken.write_text("#!/bin/sh\necho one >&2\necho it does not work >&2\necho\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(BackendGoneError) as caught:
        VirtioFs("root", shared, driver.memory, program=Virtiofsd(broken, True))
    name = f"virtiofsd of {shared}"
    assert caught.value.problem == f"{name} has ended with status 3 (it does not work)"
    with pytest.raises(BackendGoneError) as caught:
        VirtioFs("root", shared, driver.memory, program=Virtiofsd(tmp_path / "no", True))
    assert caught.value.problem == (
        f"{name} has ended with status 127 ({tmp_path}/no: No such file or directory)"
    )


@pytest.mark.parametrize("tag", ["", "t" * 37, "ü" * 19, "a\0b"])
def test_tags_that_cannot_be(driver: VirtioDriver, tag: str, tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="use 1 to 36"):
        VirtioFs(tag, tmp_path, driver.memory)


def test_directories_that_cannot_be(driver: VirtioDriver, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("none", "file", "loop"):
        with pytest.raises(ShareError, match=f"cannot share .*{name}"):
            VirtioFs("root", tmp_path / name, driver.memory)


def test_no_virtiofsd(
    driver: VirtioDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "_C", tmp_path / "none")
    monkeypatch.setattr(fs, "_RUST", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendMissingError, match="virtiofsd is not installed"):
        VirtioFs("root", tmp_path, driver.memory)
