"""Built parts, kept by the content of what they were built from.

An entry is a directory named by a hash of all its inputs, so it never goes stale: other inputs
are another entry. It is built under a temporary name and renamed when complete, and a lock per
entry lets several processes ask for the same one. Its time is that of its last use, by which
`pykvm.cache.pruning` removes what nobody wants any more.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pykvm.errors import PykvmError

__all__ = [
    "CacheError",
    "DiskFullError",
    "directory",
    "entry",
    "full_disk_named",
    "key",
    "lock_entry",
    "log_path",
    "root",
]

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheError(PykvmError):
    """The cache directory cannot be written."""


class DiskFullError(PykvmError):
    """The disk of the cache, or of temporary files, has no space left."""


def root() -> Path:
    """Return the cache: `$PYKVM_CACHE`, else `$XDG_CACHE_HOME/pykvm`, else `~/.cache/pykvm`.

    Raises:
        CacheError: there is no home directory to put it in.
    """
    if explicit := os.environ.get("PYKVM_CACHE"):
        return Path(explicit).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "pykvm"
    try:
        return Path.home() / ".cache" / "pykvm"
    except RuntimeError as error:  # no HOME, and a user without an entry in the password file
        raise CacheError(
            "this user has no home directory for the cache",
            "set PYKVM_CACHE to a directory that you may write",
        ) from error


def key(*inputs: bytes | str | int | Path) -> str:
    """Hash `inputs` into a key of 32 hexadecimal digits; a `Path` stands for its file's content.

    Every input is hashed with its length and kind, so that neighbours cannot run together.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path):
            digest.update(b"file %d\0" % item.stat().st_size)
            with item.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        else:
            # A path need not be text.
            data = item if isinstance(item, bytes) else str(item).encode(errors="surrogateescape")
            digest.update(b"%s %d\0" % (type(item).__name__.encode(), len(data)))
            digest.update(data)
    return digest.hexdigest()[:32]


def entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the entry `key` of this `kind`, built first if it is not there.

    `build` gets an empty directory to fill. If it raises, nothing is kept and the next caller
    starts anew. The result is shared: treat it as read-only.

    Raises:
        CacheError: the cache directory cannot be created or written.
        DiskFullError: see `full_disk_named`.
        Whatever `build` raises.
    """
    final = root() / kind / key
    try:
        lock = lock_entry(final)
    except OSError as error:
        if final.is_dir():  # a cache that we may only read; it appeared by rename, so it is whole
            return final
        raise _unwritable(error) from error
    with lock:
        if not final.is_dir():
            _build(final, build)
        with contextlib.suppress(OSError):  # somebody else's
            os.utime(final)
    return final


def lock_entry(entry: Path, *, wait: bool = True) -> TextIO:
    """Lock `entry`, which need not exist; closing the returned file gives the lock up.

    Raises:
        BlockingIOError: another process has it, and we are not to wait.
        OSError: the cache directory cannot be written.
    """
    path = entry.with_name(f".{entry.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, how)
            # Pruning removes the lock of an entry along with it: that file locks nothing more.
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()


def _build(final: Path, build: Callable[[Path], None]) -> None:
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a builder that was killed
    partial.mkdir()
    try:
        with full_disk_named(partial):
            build(partial)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def full_disk_named(directory: Path) -> Iterator[None]:
    """Raise `DiskFullError` in place of any error, if the disk of `directory` is full.

    What runs out of space says so in many ways, or says something else: "cannot unpack".

    Raises:
        DiskFullError: the disk of `directory` or that of temporary files is full.
    """
    try:
        yield
    except Exception as error:
        if not _has_room(directory):
            raise _full(root()) from error
        if not _has_room(Path(os.environ.get("TMPDIR") or "/tmp")):
            raise DiskFullError(
                "no space left for temporary files",
                "free some, or set TMPDIR to a directory that has some",
            ) from error
        raise


def _has_room(directory: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_CHUNK))
    except OSError as error:
        return error.errno not in _FULL
    return True


def _full(place: Path) -> DiskFullError:
    return DiskFullError(
        f"no space left for the cache at {place}",
        "free some, or set PYKVM_CACHE to a directory that has some",
    )


def log_path(name: str) -> Path:
    """Return where the log `name` of a failed build is kept; its directory exists afterwards.

    Raises:
        CacheError, DiskFullError: see `directory`.
    """
    return directory("logs") / f"{name}.log"


def directory(kind: str) -> Path:
    """Return the directory of one kind of things, which exists afterwards.

    Raises:
        CacheError, DiskFullError: it cannot be created.
    """
    made = root() / kind
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    return made


def _unwritable(error: OSError) -> PykvmError:
    if error.errno in _FULL:
        return _full(root())
    return CacheError(
        f"cannot write the cache at {root()} ({error.strerror})",
        "set PYKVM_CACHE to a directory that you may write",
    )
