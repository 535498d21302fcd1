"""pykvm.devices.virtio.storage_daemon: sectors of a qcow2 image through a real daemon."""

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio.backend_process import BackendMissingError
from pykvm.devices.virtio.device import DeviceType, Feature
from pykvm.devices.virtio.storage_daemon import ImageError, StorageDaemonDisk, image_format
from pykvm.devices.virtio.vhost_user_connection import BackendGoneError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from tests.rigs.device_failures import failures_of
from tests.rigs.virtio_driver import VirtioDriver

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]

IN, OUT, FLUSH, DISCARD = 0, 1, 4, 11
OK, IO_ERROR = b"\0", b"\1"
F_RO, F_FLUSH, F_MQ = 1 << 5, 1 << 9, 1 << 12


@pytest.fixture
def driver() -> Iterator[VirtioDriver]:
    with (
        GuestMemory.create(4 * MIB, shareable=True) as memory,
        VirtioDriver([128], Feature.EVENT_IDX | Feature.INDIRECT_DESC, memory=memory) as made,
    ):
        yield made


@pytest.fixture
def daemon() -> None:
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("no qemu-storage-daemon")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if not shutil.which("qemu-img"):
        pytest.skip("no qemu-img")
    path = tmp_path / 'a, "disk.qcow2'
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    return path


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(driver: VirtioDriver, sector: int, data: bytes, queue: int = 0) -> bytes:
    return driver.request(queue, [struct.pack("<IIQ", OUT, 0, sector), data], [1]).data


def read(driver: VirtioDriver, sector: int, size: int, queue: int = 0) -> bytes:
    done = driver.request(queue, [struct.pack("<IIQ", IN, 0, sector)], [size, 1])
    assert done.data[-1:] == OK
    return done.data[:-1]


def flush(driver: VirtioDriver) -> bytes:
    return driver.request(0, [struct.pack("<IIQ", FLUSH, 0, 0)], [1]).data


@pytest.mark.usefixtures("daemon")
def test_sectors_of_a_qcow2_image(driver: VirtioDriver, image: Path) -> None:
    with StorageDaemonDisk(image, driver.memory) as disk:
        assert disk.type is DeviceType.BLOCK
        assert disk.features & F_FLUSH
        assert not disk.features & F_RO
        capacity, _, segments = struct.unpack_from("<QII", disk.config())
        assert capacity == 64 * MIB // 512
        assert segments > 1
        driver.start(disk)
        assert read(driver, 0, 1024) == bytes(1024)
        assert write(driver, 3, b"sector 3".ljust(512, b".")) == OK
        assert write(driver, capacity - 1, b"the last".ljust(512, b".")) == OK
        assert write(driver, capacity, bytes(512)) == IO_ERROR
        assert flush(driver) == OK
        assert read(driver, 2, 1024) == bytes(512) + b"sector 3".ljust(512, b".")
        driver.stop(disk)
        driver.start(disk)  # as after a pause
        assert read(driver, capacity - 1, 8 * 64)[:8] == b"the last"
    # Its file has it, as another program of QEMU reads it.
    raw = image.with_name("raw")
    run("qemu-img", "convert", "-O", "raw", image, raw)
    assert raw.read_bytes()[3 * 512 :][:8] == b"sector 3"


@pytest.mark.usefixtures("daemon")
def test_what_was_flushed_outlives_a_killed_daemon(driver: VirtioDriver, image: Path) -> None:
    with StorageDaemonDisk(image, driver.memory) as disk:
        failures = failures_of(disk)
        driver.start(disk)
        assert write(driver, 1000, b"kept".ljust(512)) == OK
        assert flush(driver) == OK
        os.kill(disk.pid, signal.SIGKILL)
        assert failures() == [f"qemu-storage-daemon of {image} was ended by signal 9 (Killed)"]
        assert disk.stop() == {}
    with (
        StorageDaemonDisk(image, driver.memory) as disk,
        VirtioDriver([128], memory=driver.memory, at=2 * MIB) as again,
    ):
        again.start(disk)
        assert read(again, 1000, 512)[:4] == b"kept"


@pytest.mark.usefixtures("daemon")
def test_a_disk_to_read_from(driver: VirtioDriver, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"raw".ljust(MIB))
    image.chmod(0o444)
    with StorageDaemonDisk(image, driver.memory, read_only=True) as disk:
        assert disk.features & F_RO
        driver.start(disk)
        assert read(driver, 0, 512)[:3] == b"raw"
        assert write(driver, 0, bytes(512)) != OK
    assert image.read_bytes() == b"raw".ljust(MIB)


@pytest.mark.usefixtures("daemon")
def test_several_queues(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with (
        GuestMemory.create(4 * MIB, shareable=True) as memory,
        VirtioDriver([64] * 4, memory=memory) as driver,
        StorageDaemonDisk(image, memory, queues=4) as disk,
    ):
        assert disk.features & F_MQ
        assert struct.unpack_from("<H", disk.config(), 34) == (4,)
        driver.start(disk)
        for queue in range(4):
            assert write(driver, queue, bytes([queue + 1]) * 512, queue) == OK
        assert read(driver, 0, 2048, 3) == b"".join(bytes([n]) * 512 for n in (1, 2, 3, 4))


@pytest.mark.usefixtures("daemon")
def test_a_disk_in_use(driver: VirtioDriver, image: Path) -> None:
    with (
        StorageDaemonDisk(image, driver.memory),
        pytest.raises(BackendGoneError, match="Is another process using the image"),
    ):
        StorageDaemonDisk(image, driver.memory)


@pytest.mark.usefixtures("daemon")
def test_images_that_cannot_be(driver: VirtioDriver, tmp_path: Path) -> None:
    text = tmp_path / "disk.qcow2"
    text.write_text("not an image")
    with pytest.raises(BackendGoneError, match="not in qcow2 format"):
        StorageDaemonDisk(text, driver.memory)
    for path, reason in ((tmp_path / "no", "no such file"), (tmp_path, "directory")):
        with pytest.raises(ImageError, match=reason):
            StorageDaemonDisk(path, driver.memory)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no file and no block device"):
        StorageDaemonDisk(tmp_path / "pipe", driver.memory)
    for queues in (0, 65):
        with pytest.raises(ImageError, match="use 1 to 64"):
            StorageDaemonDisk(text, driver.memory, queues=queues)
    with pytest.raises(ImageError, match="use raw, qcow2"):
        StorageDaemonDisk(text, driver.memory, format="luks")


def test_the_format_is_what_the_name_says(tmp_path: Path) -> None:
    """A guest that makes its raw disk look like qcow2 does not make it one."""
    raw = tmp_path / "disk.img"
    raw.write_bytes(b"QFI\xfb" + bytes(508))
    assert image_format(raw) == "raw"
    assert image_format(Path("a.QCOW2")) == "qcow2"
    assert image_format(Path("a.vhd")) == "vpc"
    assert image_format(Path("qcow2")) == "raw"


def test_no_daemon(driver: VirtioDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendMissingError, match="qemu-storage-daemon is not installed"):
        StorageDaemonDisk(tmp_path / "disk", driver.memory)


@pytest.mark.usefixtures("daemon")
def test_a_hostile_driver(driver: VirtioDriver, image: Path) -> None:
    """Requests that cannot be end in an error of theirs, or in one clear line of the device."""
    with StorageDaemonDisk(image, driver.memory, timeout=10) as disk:
        failed = threading.Event()
        disk.on_failure = lambda reason: failed.set()
        driver.start(disk)
        assert driver.request(0, [struct.pack("<IIQ", 99, 0, 0)], [1]).data == b"\2"
        with pytest.raises(TimeoutError):
            driver.request(0, [b"short"], [1], timeout=0.5)  # no status can be written
        assert disk.stop() or failed.wait(5)


@pytest.mark.usefixtures("daemon")
def test_it_ends_with_a_killed_monitor(image: Path) -> None:
    """The lock on its image would keep the next machine from starting."""
    program = (
        "import pathlib, sys, time\n"
        "from pykvm.devices.virtio.storage_daemon import StorageDaemonDisk\n"
        "from pykvm.memory.guest_memory import GuestMemory\n"
        "memory = GuestMemory.create(1 << 20, shareable=True)\n"
        "disk = StorageDaemonDisk(pathlib.Path(sys.argv[1]), memory)\n"
        "print(disk.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, image], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as monitor:
        assert monitor.stdout is not None
        process = os.pidfd_open(int(monitor.stdout.readline()))
        monitor.kill()
    assert select.select([process], [], [], 10)[0]  # readable once it has ended
    os.close(process)
