"""pykvm.snapshot.folder: whole or not there, and checked when it is read."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pykvm.errors import PykvmError
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import MIB
from pykvm.snapshot.disks import DiskChangedError, SavedDisk
from pykvm.snapshot.folder import (
    Contents,
    NotASnapshotError,
    SnapshotDamagedError,
    SnapshotExistsError,
    SnapshotMissingError,
    SnapshotVersionError,
    SnapshotWriteError,
)
from pykvm.snapshot.folder_reader import Snapshot
from pykvm.snapshot.folder_writer import write_snapshot
from pykvm.snapshot.machine_state import require_disks, require_same_disks
from tests.rigs.messages import one_line
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

CONTENTS = Contents(
    machine={"cpus": 2},
    kvm={"vcpus": []},
    devices={"com1": {"lcr": 3}},
    blobs={"vhost-net.0": b"bytes \0\xff"},
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create(2 * MIB, shareable=True) as memory:
        memory.write(MIB, b"the guest's")
        yield memory


@pytest.fixture
def path(tmp_path: Path, memory: GuestMemory) -> Path:
    """A snapshot."""
    path = tmp_path / "s"
    write_snapshot(path, CONTENTS, memory)
    return path


def test_written_and_read(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(
        ("manifest.json", "manifest.sha256", "memory", "vhost-net.0"), 0o600
    )
    assert [file.name for file in path.parent.iterdir()] == ["s"]
    done = subprocess.run(["sha256sum", "--check", "manifest.sha256"], cwd=path, check=False)
    assert done.returncode == 0
    with Snapshot(path) as snapshot:
        assert snapshot.contents.machine == {"cpus": 2}
        assert snapshot.contents.kvm == {"vcpus": []}
        assert snapshot.contents.devices == {"com1": {"lcr": 3}}
        assert snapshot.blob("vhost-net.0") == snapshot.blob("vhost-net.0") == b"bytes \0\xff"
        with snapshot.map_memory() as mapped, snapshot.copy_memory() as copied:
            snapshot.close()
            assert mapped.read(MIB, 11) == copied.read(MIB, 11) == b"the guest's"
            assert copied.regions[0].shareable
    with Snapshot(path) as snapshot, pytest.raises(SnapshotDamagedError, match="vhost is missing"):
        snapshot.blob("vhost")


def change_manifest(path: Path, **values: Any) -> None:
    """Change entries of the manifest, and its checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, value in values.items():
        if value is ...:
            del manifest[name]
        else:
            manifest[name] = value
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")


def flip(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"cpus": 2', '"cpus": 3'))


def shorten(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def replace_by_link(path: Path) -> None:
    (path / "memory").rename(path.parent / "elsewhere")
    (path / "memory").symlink_to(path.parent / "elsewhere")


def replace_by_pipe(path: Path) -> None:
    (path / "memory").unlink()
    os.mkfifo(path / "memory")


def changed(**values: Any) -> Callable[[Path], None]:
    return lambda path: change_manifest(path, **values)


REGION = {"name": "a", "gpa": 0, "size": 2 * MIB, "offset": 0, "read_only": False}
DISK = {"name": "a", "path": "/dev/null", "size": 0, "modified": None}


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (flip, SnapshotDamagedError, "does not match its checksum"),
        (shorten("manifest.json", 100), SnapshotDamagedError, "no json"),
        (shorten("manifest.json", 0), SnapshotDamagedError, "no json"),
        (shorten("manifest.sha256", 20), SnapshotDamagedError, "checksum"),
        (shorten("memory", MIB), SnapshotDamagedError, "memory has 1048576 bytes in place"),
        (shorten("memory", 3 * MIB), SnapshotDamagedError, "memory has 3145728 bytes in place"),
        (shorten("vhost-net.0", 3), SnapshotDamagedError, "vhost-net.0 has 3 bytes"),
        (remove("manifest.json"), NotASnapshotError, "no manifest.json"),
        (remove("manifest.sha256"), SnapshotDamagedError, "manifest.sha256 is missing"),
        (remove("memory"), SnapshotDamagedError, "memory is missing"),
        (remove("vhost-net.0"), SnapshotDamagedError, "vhost-net.0 is missing"),
        (replace_by_link, SnapshotDamagedError, "memory is missing"),
        (replace_by_pipe, SnapshotDamagedError, "memory is missing"),
        (changed(format=2), SnapshotVersionError, "format 2, and this pykvm reads 1"),
        (changed(format="1"), SnapshotVersionError, "format '1'"),
        (changed(format=True), SnapshotVersionError, "format True"),
        (changed(format=...), SnapshotVersionError, "format None"),
        (changed(kind="image"), NotASnapshotError, "of something else"),
        (changed(machine=[]), SnapshotDamagedError, "lacks something"),
        (changed(kvm=...), SnapshotDamagedError, "lacks something"),
        (changed(devices=None), SnapshotDamagedError, "lacks something"),
        (changed(memory=5), SnapshotDamagedError, "lacks something"),
        (changed(memory=[]), SnapshotDamagedError, "lacks something"),
        (changed(memory=[{**REGION, "size": 4096}]), SnapshotDamagedError, "lacks something"),
        (changed(memory=[{**REGION, "gpa": 1}]), SnapshotDamagedError, "lacks something"),
        (changed(disks=[{**DISK, "size": "0"}]), SnapshotDamagedError, "lacks something"),
        (changed(disks=[{**DISK, "path": "\0"}]), SnapshotDamagedError, "lacks something"),
        (changed(disks=[[]]), SnapshotDamagedError, "lacks something"),
        (changed(files={}), SnapshotDamagedError, "lacks something"),
        (changed(files={"memory": 2 * MIB, "../s": 0}), SnapshotDamagedError, "lacks something"),
        (changed(files={"memory": 2 * MIB, "MEM": 0}), SnapshotDamagedError, "lacks something"),
    ],
)
def test_damages(
    path: Path, damage: Callable[[Path], None], kind: type[PykvmError], message: str
) -> None:
    damage(path)
    with pytest.raises(kind, match=message) as caught:
        Snapshot(path)
    assert type(caught.value) is kind
    one_line(caught.value)
    open_files = Path("/proc/self/fd")
    with contextlib.suppress(OSError):
        names = [os.readlink(open_files / fd) for fd in os.listdir(open_files)]
        assert not [name for name in names if name.startswith(f"{path}/")]


def test_deep_json(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(SnapshotDamagedError, match="no json"):
        Snapshot(path)


def test_regions_over_each_other(path: Path) -> None:
    change_manifest(path, memory=[REGION, {**REGION, "gpa": MIB}])
    with Snapshot(path) as snapshot:
        for get in (snapshot.map_memory, snapshot.copy_memory):
            with pytest.raises(SnapshotDamagedError, match="cannot be mapped") as caught:
                get()
            one_line(caught.value)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "nothing", "nothing/more"):
        with pytest.raises(SnapshotMissingError) as missing:
            Snapshot(tmp_path / name)
        one_line(missing.value)
    with pytest.raises(NotASnapshotError, match=r"no manifest\.json") as foreign:
        Snapshot(tmp_path)
    one_line(foreign.value)


def test_places_that_are_taken(tmp_path: Path, memory: GuestMemory) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "empty", "link"):
        with pytest.raises(SnapshotExistsError, match="is there already") as caught:
            write_snapshot(tmp_path / name, CONTENTS, memory)
        one_line(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file", "link"]
    with pytest.raises(SnapshotWriteError, match="no such file") as missing:
        write_snapshot(tmp_path / "no" / "folder", CONTENTS, memory)
    one_line(missing.value)


@pytest.mark.parametrize("name", ["memory", "manifest.json", "a/b", "..", "", "A"])
def test_names_of_blobs(tmp_path: Path, memory: GuestMemory, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        write_snapshot(tmp_path / "s", Contents({}, {}, {}, blobs={name: b""}), memory)


def test_a_file_that_may_not_grow(tmp_path: Path, memory: GuestMemory) -> None:
    """A limit of the process stands for a full disk: nothing is left, and the error says it."""
    script = """\
import resource, signal, sys
from pathlib import Path
from pykvm.memory.guest_memory import GuestMemory
from pykvm.snapshot.folder import Contents, SnapshotWriteError
from pykvm.snapshot.folder_writer import write_snapshot

with GuestMemory.create(8 << 20, shareable=True) as memory:
    memory.write(0, b"1" * (8 << 20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
    try:
        write_snapshot(Path(sys.argv[1]), Contents({}, {}, {}), memory)
    except SnapshotWriteError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot write the snapshot" in done.stdout, done.stderr
    assert "file too large" in done.stdout
    assert not list(tmp_path.iterdir())


_WRITES = """\
import sys
from pathlib import Path
from pykvm.memory.guest_memory import GuestMemory
from pykvm.snapshot import folder_writer
from pykvm.snapshot.folder import Contents

path = Path(sys.argv[1])
with GuestMemory.create(64 << 20, shareable=True) as memory:
    memory.write(0, b"1" * (64 << 20))
    print("ready", flush=True)
    folder_writer.write_snapshot(path, Contents({}, {}, {}), memory)
"""


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05, 0.1])
def test_a_killed_writer(tmp_path: Path, memory: GuestMemory, delay: float) -> None:
    """It leaves all or nothing under the name; the next writer removes what else is left."""
    path = tmp_path / "s"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    if path.exists():
        Snapshot(path).close()
        return
    write_snapshot(path, CONTENTS, memory)
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_two_writers(tmp_path: Path, memory: GuestMemory) -> None:
    """A living writer's folder stays; the second to finish finds the name taken."""
    path = tmp_path / "s"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: any(tmp_path.glob(".s.partial-*/memory")))
        process.send_signal(signal.SIGSTOP)
        write_snapshot(path, CONTENTS, memory)
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate(timeout=60)
    assert "SnapshotExistsError" in told
    assert [each.name for each in tmp_path.iterdir()] == ["s"]
    with Snapshot(path) as snapshot:
        assert snapshot.contents.machine == {"cpus": 2}


# ---- disks ---------------------------------------------------------------------------------------


def test_disks(tmp_path: Path, memory: GuestMemory) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"file system")
    disk = SavedDisk.of("disk0", image)
    write_snapshot(tmp_path / "s", Contents({}, {}, {}, disks=[disk]), memory)
    times = (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    with Snapshot(tmp_path / "s") as snapshot:
        assert snapshot.contents.disks == [disk]
        image.read_bytes()
        require_disks(snapshot)

        def refused(message: str) -> None:
            with pytest.raises(DiskChangedError, match=message) as caught:
                require_disks(snapshot)
            assert str(image) in str(caught.value)
            one_line(caught.value)

        image.write_bytes(b"File system")
        os.utime(image, ns=(times[0], times[1] + 1))
        refused("time of its last change is another")
        os.utime(image, ns=times)
        require_disks(snapshot)
        image.write_bytes(b"file system!")
        refused("size is another")
        image.unlink()
        refused("cannot be opened")


def test_other_disks(tmp_path: Path, memory: GuestMemory) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(512))
    one, other = (SavedDisk.of("pci1", tmp_path / name) for name in ("a", "b"))
    write_snapshot(tmp_path / "s", Contents({}, {}, {}, disks=[one]), memory)
    with Snapshot(tmp_path / "s") as snapshot:
        require_same_disks(snapshot, [one])
        for disks in ([], [other], [one, other], [replace(one, name="pci2")]):
            with pytest.raises(DiskChangedError, match="to the machine alone") as caught:
                require_same_disks(snapshot, disks)
            one_line(caught.value)


def test_a_device_has_no_time() -> None:
    """It is opened by many; a block device's node does not tell when its contents changed."""
    disk = SavedDisk.of("null", Path("/dev/null"))
    assert disk.size == 0
    for device in Path("/dev").glob("loop[0-9]*"):
        with contextlib.suppress(OSError):
            if device.is_block_device():
                assert SavedDisk.of("a block device", device).modified is None
