"""The content of the cache, and the removal of what has not been used for long.

An entry's time is that of its last use (`pykvm.cache.entry` renews it). Nothing is removed
whose lock somebody holds, nor anything that was used within the last hour: whoever was given an
entry may still be reading it.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pykvm import cache
from pykvm.cache import scratch

__all__ = ["KEPT_DAYS", "Kind", "keep_newest", "kinds", "prune", "prune_daily"]

# Unused for this long, an entry is removed without being asked for.
KEPT_DAYS = 30.0

_DAY = 86400.0
_IN_USE = 3600.0
_FILES = ("debs", "logs")  # plain files instead of entries


@dataclass(frozen=True)
class Kind:
    """One kind of cached things.

    Attributes:
        name: "modules", "testbed-host" and so on.
        entries: how many there are.
        size: bytes on disk; what several entries share counts once.
        last_used: seconds since the epoch; 0 if there is no entry.
    """

    name: str
    entries: int
    size: int
    last_used: float


def kinds() -> list[Kind]:
    """Return the kinds of things in the cache, by name."""
    seen: set[tuple[int, int]] = set()
    found = []
    for directory in _directories():
        items = list(_items(directory))
        size = sum(_size(item, seen) for item in items)
        found.append(Kind(directory.name, len(items), size, max(map(_time, items), default=0)))
    return found


def prune(days: float = KEPT_DAYS) -> int:
    """Remove what has not been used for `days`, and what killed processes left.

    Returns:
        How many entries and files were removed.
    """
    return sum(
        _remove(item, days * _DAY) for directory in _directories() for item in _items(directory)
    ) + sum(_sweep(directory) for directory in _directories())


def prune_daily() -> None:
    """Prune, if that was not done within the last day; ignore errors."""
    stamp = cache.root() / ".pruned"
    try:
        if time.time() - _time(stamp) > _DAY:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
            prune()
    except OSError:
        pass


def keep_newest(directory: Path, count: int) -> None:
    """Remove all entries of the kind in `directory` but the `count` that were used last."""
    items = sorted(_items(directory), key=_time, reverse=True)
    for item in items[count:]:
        _remove(item, 0)


def _directories() -> list[Path]:
    root = cache.root()
    if not root.is_dir():
        return []
    return sorted(
        path for path in root.iterdir() if path.is_dir() and path.name not in scratch.KINDS
    )


def _items(directory: Path) -> Iterator[Path]:
    return (path for path in directory.iterdir() if not path.name.startswith("."))


def _remove(item: Path, age: float) -> bool:
    """Remove an entry or a file that was not used for `age` seconds; whether that was done."""
    if time.time() - _time(item) <= max(age, _IN_USE):
        return False
    try:
        if item.parent.name in _FILES:
            item.unlink()
            return True
        with cache.lock_entry(item, wait=False):
            # Somebody may have been faster, to use it or to remove it.
            if not item.is_dir() or time.time() - _time(item) <= max(age, _IN_USE):
                return False
            doomed = item.with_name(f".{item.name}.doomed")
            item.rename(doomed)  # at once: an entry that is there is whole
            shutil.rmtree(doomed, ignore_errors=True)
            item.with_name(f".{item.name}.lock").unlink()
            return True
    except OSError:  # in use, or not ours
        return False


def _sweep(directory: Path) -> int:
    """Remove what processes left that were killed while they built or pruned; say how many."""
    removed = 0
    for pattern in (".*.partial", ".*.doomed", ".*.lock"):
        for path in list(directory.glob(pattern)):
            item = path.with_name(path.stem[1:])
            if directory.name in _FILES or (path.suffix == ".lock" and item.exists()):
                continue
            if time.time() - _time(path) <= _IN_USE:
                continue
            try:
                with cache.lock_entry(item, wait=False):
                    if path.suffix != ".lock":
                        shutil.rmtree(path, ignore_errors=True)
                        removed += 1
                    elif not item.exists():
                        path.unlink()
            except OSError:
                continue
    return removed


def _size(item: Path, seen: set[tuple[int, int]]) -> int:
    """Bytes on disk of all files in `item` that are not in `seen`, which grows by them."""
    total = 0
    paths = [item]
    for top, directories, files in os.walk(item):
        paths += [Path(top, name) for name in (*directories, *files)]
    for path in paths:
        try:
            status = path.lstat()
        except OSError:  # just removed
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
    return total


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
