"""Directories in the cache for work in progress, each locked by its owner while that lives."""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pykvm import cache

__all__ = ["KINDS", "directory"]

KINDS: Final = ("testbed-instances", "fresh-machines")
"""Kinds of work: one emulator each; one root file system of `make fresh` each."""

_YOUNG = 60.0  # seconds


@contextmanager
def directory(kind: str) -> Iterator[Path]:
    """Yield a directory of one of `KINDS`, and remove it afterwards.

    Those of killed processes are removed as well.

    Raises:
        CacheError, DiskFullError: see `pykvm.cache.directory` and `full_disk_named`.
    """
    parent = cache.directory(kind)
    for old in parent.iterdir():
        _remove_if_dead(old)
    made = Path(tempfile.mkdtemp(dir=parent))
    with (made / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        try:
            with cache.full_disk_named(made):
                yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _remove_if_dead(other: Path) -> None:
    try:
        # Between making a directory and locking it passes no minute.
        if time.time() - other.stat().st_mtime < _YOUNG:
            return
        with (other / "alive").open("r+") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
    except OSError:
        pass  # in use, or being made
