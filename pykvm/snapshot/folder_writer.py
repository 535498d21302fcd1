"""Writes the folder of a snapshot (`pykvm.snapshot.folder`)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pykvm.memory.guest_memory import GuestMemory
from pykvm.snapshot import memory as memory_file
from pykvm.snapshot.folder import (
    CHECKSUM,
    FORMAT,
    KIND,
    MANIFEST,
    MEMORY,
    Contents,
    SnapshotExistsError,
    SnapshotWriteError,
    may_be_named,
)

__all__ = ["write_snapshot"]


def write_snapshot(path: Path, contents: Contents, memory: GuestMemory) -> int:
    """Write a new folder; return how many bytes of memory it holds beside zeros.

    Raises:
        SnapshotExistsError: there is something already.
        SnapshotWriteError: it cannot be written. Nothing is left.
    """
    if bad := [name for name in contents.blobs if not may_be_named(name)]:
        raise ValueError(f"a blob cannot be named {bad[0]!r}")
    if os.path.lexists(path):
        raise _exists(path)
    try:
        with _partial(path) as partial:
            written = _fill(partial, contents, memory)
            # A folder without files in it would be replaced: it is not ours either.
            if os.path.lexists(path):
                raise _exists(path)
            partial.rename(path)
            _sync(path.parent)
    except OSError as error:
        raise SnapshotWriteError(
            f"cannot write the snapshot {path} ({os.strerror(error.errno or 0).lower()})",
            "choose a folder that it may write (pykvm run --snapshots DIR), with enough space",
        ) from error
    return written


def _exists(path: Path) -> SnapshotExistsError:
    return SnapshotExistsError(f"{path} is there already", "remove it, or choose another name")


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield a locked folder beside `path`, and remove it unless it has been renamed."""
    prefix = f".{path.name}.partial-"
    for old in path.parent.glob(f"{_escaped(prefix)}*"):
        _remove_if_dead(old)
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))  # mode 0700
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _locked(lock, made):
            break
        os.close(lock)  # another process took it for a dead one's
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _locked(fd: int, path: Path) -> bool:
    """Lock a folder; return whether that worked and it still has its name."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))
    except OSError:
        return False


def _remove_if_dead(partial: Path) -> None:
    try:
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid == os.geteuid() and _locked(fd, partial):
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(fd)


def _fill(folder: Path, contents: Contents, memory: GuestMemory) -> int:
    from pykvm.version import version  # noqa: PLC0415  (it takes long to import)

    with _created(folder / MEMORY) as fd:
        written = memory_file.save_memory(memory, fd)
    for name, data in contents.blobs.items():
        _write(folder / name, data)
    places = memory_file.place_regions(memory)
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "pykvm": version(),
        "kernel": platform.release(),
        "machine": contents.machine,
        "memory": [place.to_values() for place in places],
        "disks": [disk.to_values() for disk in contents.disks],
        "devices": contents.devices,
        "kvm": contents.kvm,
        "files": {
            MEMORY: memory_file.memory_size(places),
            **{name: len(data) for name, data in contents.blobs.items()},
        },
    }
    text = json.dumps(manifest, indent=1).encode()
    _write(folder / MANIFEST, text)
    _write(folder / CHECKSUM, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode())
    _sync(folder)
    return written


@contextlib.contextmanager
def _created(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file, which is on disk afterwards."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    with _created(path) as fd:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
