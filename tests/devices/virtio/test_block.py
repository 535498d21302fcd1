"""pykvm.devices.virtio.block: a disk that is read and written, and a driver that asks nonsense."""

from __future__ import annotations

import os
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.devices.virtio.block import Block, DiskError, DiskFile, DiskInUseError
from pykvm.sizes import MIB
from tests.rigs.virtio_disk import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    ZEROES,
    DiskDriver,
    header,
)
from tests.rigs.virtio_driver import RING_FEATURES
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

F_FLUSH = 1 << 9
SECTORS = 8 * MIB // 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.raw"
    with made.open("wb") as file:
        file.truncate(8 * MIB)
    return made


class Disk:
    """A driver and its disk."""

    def __init__(self, path: Path, features: int, **more: bool) -> None:
        self.path = path
        self.driver = DiskDriver([64], features | F_FLUSH)
        self.device = Block(self.driver.memory, DiskFile(path, **more), id="serial-1")
        self.driver.start(self.device)

    def close(self) -> None:
        self.device.close()
        self.driver.close()


@pytest.fixture(params=RING_FEATURES, ids=hex)
def disk(request: pytest.FixtureRequest, path: Path) -> Iterator[Disk]:
    made = Disk(path, request.param)
    yield made
    made.close()


@pytest.fixture
def plain(path: Path) -> Iterator[Disk]:
    made = Disk(path, RING_FEATURES[-1])
    yield made
    made.close()


def test_reading_and_writing(disk: Disk) -> None:
    driver = disk.driver
    data = random.Random(1).randbytes(300 * 512)
    assert driver.read(0, 4096) == bytes(4096)
    driver.write(1000, data)
    assert driver.read(1000, len(data)) == data
    assert driver.read(1299, 1024) == data[-512:] + bytes(512)
    driver.flush()
    assert disk.path.read_bytes()[512_000 : 512_000 + len(data)] == data
    driver.write(SECTORS - 1, b"e" * 512)
    assert driver.read(SECTORS - 1, 512) == b"e" * 512
    counters = disk.device.counters
    assert (counters.reads, counters.writes, counters.flushes, counters.errors) == (4, 2, 1, 0)
    assert counters.bytes_written == len(data) + 512


def test_another_device_goes_on(disk: Disk) -> None:
    """As after a snapshot, with the disk as it was; what a snapshot has to name is the file."""
    driver = disk.driver
    driver.write(7, b"a" * 512)
    driver.stop(disk.device)
    assert disk.device.save() is None
    assert list(disk.device.disk_files()) == [disk.path]
    disk.device.close()
    disk.device = Block(driver.memory, DiskFile(disk.path))
    disk.device.restore(None)
    driver.start(disk.device)
    assert driver.read(7, 512) == b"a" * 512
    driver.write(7, b"b" * 512)
    assert driver.read(7, 512) == b"b" * 512


def test_any_layout_of_a_request(plain: Disk) -> None:
    """Header, data and status are bytes, however the driver cuts them (2.6.4)."""
    driver = plain.driver
    data = bytes(range(256)) * 4
    whole = header(OUT, 8) + data
    for cuts in ((16, 1040), (1, 16, 17, 1000), (8, 500, 501), (1040,)):
        parts = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)), strict=True)]
        done = driver.request(0, parts, [1])
        assert done.data == b"\0"
    for sizes in ((1025,), (1, 511, 512, 1), (1023, 2), (1000, 25)):
        done = driver.request(0, [header(IN, 8)[:3], header(IN, 8)[3:]], list(sizes))
        assert done.data == data + b"\0"


def test_many_at_a_time(disk: Disk) -> None:
    """Random reads and writes, as many as the ring holds, against a model."""
    pick = random.Random(2)
    driver = disk.driver
    model = bytearray(8 * MIB)
    busy: dict[int, tuple[int, bytes]] = {}
    answered = 0
    while answered < 2000:
        for _ in range(pick.randint(1, 20)):
            slot = pick.randrange(1024)
            if slot in [at for at, _ in busy.values()]:
                continue
            if pick.random() < 0.5:
                data = pick.randbytes(512 * pick.randint(1, 16))
                request = driver.begin_write(slot * 16, data)
            else:
                size = 512 * pick.randint(1, 16)
                data = bytes(model[slot * 8192 : slot * 8192 + size])
                request = driver.submit(0, [header(IN, slot * 16)], [size, 1])
            if request:
                busy[id(request)] = slot, data
        driver.kick(0)
        for done in driver.completed(0, 1 if busy else 0):
            slot, data = busy.pop(id(done))
            assert done.data[-1] == OK
            if len(done.data) == 1:
                model[slot * 8192 : slot * 8192 + len(data)] = data
            else:
                assert done.data[:-1] == data
            answered += 1
    while busy:
        for done in driver.completed(0):
            slot, data = busy.pop(id(done))
            if len(done.data) == 1:
                model[slot * 8192 : slot * 8192 + len(data)] = data
    assert disk.path.read_bytes() == model


def test_a_flush_comes_after_the_writes_before_it() -> None:
    """Even of those that the driver has not seen answered.

    In memory, where a flush takes no time and a long write does.
    """
    file = os.memfd_create("disk")
    os.ftruncate(file, 8 * MIB)
    disk = Disk(Path(f"/proc/self/fd/{file}"), RING_FEATURES[-1])
    driver = disk.driver
    for n in range(100):
        before = [driver.begin_write(i * 1024, bytes([n]) * (MIB // 2)) for i in range(12)]
        flush = driver.begin_flush()
        assert flush
        driver.kick(0)
        done: list[object] = []
        while flush not in done:
            done += driver.completed(0)
        assert all(write in done[: done.index(flush)] for write in before)
        assert {os.pread(file, 1, (i + 1) * MIB // 2 - 1)[0] for i in range(12)} == {n}
        while driver.pending:
            driver.completed(0)
    disk.close()
    os.close(file)


def test_what_is_not_on_the_disk(plain: Disk) -> None:
    driver = plain.driver
    for sector, size in (
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (2**55, 512),
        (2**64 - 1, 512),
        (2**64 - 1, 1024),
        (0, 511),
        (0, 513),
        (3, 1),
    ):
        assert driver.ask(IN, sector, size=size) == (IOERR, bytes(size))
        assert driver.ask(OUT, sector, b"x" * size)[0] == IOERR
    assert driver.ask(OUT, SECTORS)[0] == OK  # nothing
    assert driver.read(0, 512) == bytes(512)
    assert plain.device.counters.errors == 16


def test_what_is_not_a_request(plain: Disk) -> None:
    driver = plain.driver
    for kind in (2, 3, 5, 6, 7, 9, 10, 12, 14, 24, 2**31, 2**32 - 1):
        assert driver.ask(kind, size=20) == (UNSUPP, bytes(20))
    for n in range(16):
        assert driver.request(0, [header(IN, 0)[:n]], [513]).data == bytes(512) + b"\1"
    assert driver.request(0, [], [1]).data == b"\1"
    assert driver.request(0, [header(IN, 0)], []).written == 0
    assert driver.request(0, [header(OUT, 0) + b"y" * 512]).written == 0
    assert driver.read(0, 512) == bytes(512), "without a status it is not done"


def test_the_identity(plain: Disk) -> None:
    driver = plain.driver
    assert driver.ask(GET_ID, size=20) == (OK, b"serial-1".ljust(20, b"\0"))
    assert driver.ask(GET_ID, size=6) == (OK, b"serial")
    assert driver.ask(GET_ID, size=30) == (OK, b"serial-1".ljust(30, b"\0"))
    assert driver.ask(GET_ID) == (OK, b"")


def _range(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def test_discard_and_zeroes(disk: Disk) -> None:
    driver, path = disk.driver, disk.path
    driver.write(0, b"x" * 512 * 256)
    driver.flush()
    full = path.stat().st_blocks
    assert driver.ask(DISCARD, 0, _range(8, 64) + _range(128, 8))[0] == OK
    assert path.stat().st_blocks <= full - 64
    assert path.stat().st_size == 8 * MIB
    assert driver.read(0, 80 * 512) == b"x" * 8 * 512 + bytes(64 * 512) + b"x" * 8 * 512
    assert driver.ask(ZEROES, 0, _range(1, 2) + _range(200, 8, flags=1))[0] == OK
    assert driver.read(0, 4 * 512) == b"x" * 512 + bytes(1024) + b"x" * 512
    assert driver.read(199, 10 * 512) == b"x" * 512 + bytes(4096) + b"x" * 512
    assert driver.ask(DISCARD, 0, _range(0, 0))[0] == OK
    assert disk.device.counters.discards == 3


def test_ranges_that_cannot_be(plain: Disk) -> None:
    driver = plain.driver
    driver.write(0, b"x" * 4096)
    for kind in (DISCARD, ZEROES):
        for data in (
            b"",
            _range(0, 1)[:15],
            _range(0, 1) + b"x",
            _range(0, 1) * 17,
            _range(SECTORS, 1),
            _range(0, SECTORS + 1),
            _range(2**64 - 1, 2),
            _range(0, 2**32 - 1),
        ):
            assert driver.ask(kind, 0, data)[0] == IOERR, data
        assert driver.ask(kind, 0, _range(0, 1, flags=2))[0] == UNSUPP
    assert driver.ask(DISCARD, 0, _range(0, 1, flags=1))[0] == UNSUPP
    assert driver.read(0, 4096) == b"x" * 4096


def test_a_disk_that_is_only_read(path: Path) -> None:
    path.write_bytes(b"r" * MIB)
    path.chmod(0o400)
    disk, other = (Disk(path, RING_FEATURES[-1], read_only=True) for _ in range(2))
    driver = disk.driver
    assert disk.device.features & 1 << 5
    assert driver.read(0, 512) == b"r" * 512
    assert other.driver.read(0, 512) == b"r" * 512
    assert driver.ask(OUT, 0, b"w" * 512)[0] == IOERR
    assert driver.ask(DISCARD, 0, _range(0, 8))[0] == IOERR
    assert driver.ask(ZEROES, 0, _range(0, 8))[0] == IOERR
    driver.flush()
    disk.close()
    other.close()
    assert path.read_bytes() == b"r" * MIB


def test_without_flush_each_write_is_durable(path: Path) -> None:
    """A driver that cannot ask for it gets it always; pwritev2() is asked for RWF_DSYNC."""
    disk = Disk(path, RING_FEATURES[-1])
    disk.driver.stop(disk.device)
    disk.driver.features &= ~F_FLUSH
    disk.driver.start(disk.device)
    disk.driver.write(0, b"d" * 4096)
    assert disk.driver.ask(ZEROES, 0, _range(1, 2))[0] == OK
    assert disk.driver.read(0, 2048) == b"d" * 512 + bytes(1024) + b"d" * 512
    assert disk.device.counters.waited >= 2, "it is not done at once"
    disk.close()


def test_a_full_disk(plain: Disk) -> None:
    """The host's refusal is the guest's error, and the caller is told why."""
    reasons: list[str] = []
    plain.device.on_error = reasons.append
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
    try:
        assert plain.driver.ask(OUT, 5 * MIB // 512, b"x" * 4096)[0] == IOERR
        plain.driver.write(0, b"y" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wait_for(lambda: reasons, 10)
    assert reasons == [f"disk {plain.path}: file too large"]
    plain.driver.write(5 * MIB // 512, b"x" * 4096)


def test_a_file_that_shrinks(plain: Disk) -> None:
    os.truncate(plain.path, MIB)
    assert plain.driver.ask(IN, 2 * MIB // 512, size=4096) == (IOERR, bytes(4096))
    assert plain.driver.ask(IN, MIB // 512 - 1, size=1024) == (IOERR, bytes(1024))
    assert plain.driver.read(0, 512) == bytes(512)


def test_stopped_under_load(disk: Disk) -> None:
    """Everything that was taken is answered, and the rest is done after the next start."""
    driver = disk.driver
    pick = random.Random(4)
    begun = answered = 0
    for _ in range(60):
        for _ in range(pick.randint(0, 12)):
            begun += driver.begin_write(pick.randrange(100) * 64, b"z" * 32_768) is not None
        driver.kick(0)
        driver.stop(disk.device)
        answered += len(driver.completed(0, 0, 0))
        driver.start(disk.device)
    answered += len(driver.completed(0, begun - answered))
    assert answered == begun


def test_configuration(plain: Disk) -> None:
    config = plain.device.config()
    assert len(config) == 60
    assert struct.unpack_from("<Q", config) == (SECTORS,)
    assert struct.unpack_from("<II", config, 8) == (0, 254)
    assert struct.unpack_from("<IBBHI", config, 20) == (512, 3, 0, 8, 0)
    assert struct.unpack_from("<H", config, 34) == (1,)
    assert struct.unpack_from("<IIIII", config, 36) == (8388608, 16, 8, 65536, 16)
    assert config[56] == 1


def test_one_writer(path: Path) -> None:
    first = DiskFile(path)
    for read_only in (False, True):
        with pytest.raises(DiskInUseError, match=r"disk.raw is in use by another process: stop"):
            DiskFile(path, read_only=read_only)
    first.close()
    first.close()
    reader = DiskFile(path, read_only=True)
    with pytest.raises(DiskInUseError):
        DiskFile(path)
    reader.close()
    DiskFile(path).close()


def test_what_is_no_disk(tmp_path: Path) -> None:
    odd, empty, fifo = tmp_path / "odd", tmp_path / "empty", tmp_path / "fifo"
    odd.write_bytes(b"x" * 1000)
    empty.touch()
    os.mkfifo(fifo)
    before = len(os.listdir("/proc/self/fd"))
    for path, message in (
        (odd, r"has 1000 bytes, not a multiple of 512: extend it: truncate --size %512"),
        (empty, r"is empty: truncate --size 1G"),
        (fifo, r"is neither a file nor a block device"),
        (tmp_path, r"is a directory: name a file"),
        (tmp_path / "none", r"no such file or directory: make it: truncate"),
        (Path("/dev/null"), r"is neither a file nor a block device"),
    ):
        with pytest.raises(DiskError, match=message):
            DiskFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_device(plain: Disk) -> None:
    memory = plain.driver.memory
    with pytest.raises(DiskError, match="at most 20 bytes"):
        Block(memory, plain.device.disk, id="x" * 21)
    for threads in (0, 65):
        with pytest.raises(DiskError, match="use 1 to 64"):
            Block(memory, plain.device.disk, threads=threads)


def test_flush_requests_have_no_data(plain: Disk) -> None:
    assert plain.driver.ask(FLUSH, 77, b"what for", size=9) == (OK, bytes(9))
