"""Pruning of the cache removes only entries that are old, complete and unused."""

import fcntl
import os
import time
from pathlib import Path

import pytest

from pykvm import cache
from pykvm.cache import pruning as cache_pruning
from pykvm.cli.main import main

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

DAY = 86400


def _made(key: str, days: float, kind: str = "kind") -> Path:
    """Make an entry of 1 MiB that was last used `days` ago."""
    entry = cache.entry(kind, key, lambda out: _fill(out / "part"))
    return _age(entry, days)


def _fill(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 4096)


def _age(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def test_old_entries_go_with_their_locks() -> None:
    old, young = _made("old", 31), _made("young", 29)
    assert cache_pruning.prune(30) == 1
    assert not old.exists()
    assert (young / "part").stat().st_size == 1 << 20
    assert sorted(path.name for path in young.parent.iterdir()) == [".young.lock", "young"]


def test_use_renews() -> None:
    old = _made("old", 31)
    assert cache.entry("kind", "old", lambda out: pytest.fail("it is there")) == old
    assert time.time() - old.stat().st_mtime < 60
    assert cache_pruning.prune(30) == 0
    assert old.is_dir()


def test_the_last_hour_is_kept() -> None:
    fresh, older = _made("fresh", 0.5 / 24), _made("older", 1.5 / 24)
    assert cache_pruning.prune(0) == 1
    assert fresh.is_dir()
    assert not older.exists()


def test_what_is_locked_is_kept() -> None:
    old = _made("old", 31)
    with cache.lock_entry(old):
        assert cache_pruning.prune(30) == 0
    assert old.is_dir()
    assert cache_pruning.prune(30) == 1


def test_a_lock_that_was_removed_meanwhile_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.root() / "kind/key"
    real = fcntl.flock
    replaced: list[Path] = []

    def flock(file: int, how: int) -> None:
        if not replaced:  # a pruner ran between opening the file and locking it
            replaced.append(entry.with_name(".key.lock"))
            replaced[0].unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.lock_entry(entry), pytest.raises(BlockingIOError):
        cache.lock_entry(entry, wait=False)
    assert replaced


def test_an_entry_is_built_again_after_pruning() -> None:
    _made("old", 31)
    assert cache_pruning.prune(30) == 1
    again = cache.entry("kind", "old", lambda out: (out / "new").touch())
    assert [path.name for path in again.iterdir()] == ["new"]


def test_what_killed_processes_left_goes() -> None:
    directory = _made("whole", 31).parent
    for name in (".killed.partial", ".killed.doomed"):
        (directory / name).mkdir()
        (directory / name / "half").touch()
        _age(directory / name, 1)
    (directory / ".gone.lock").touch()
    _age(directory / ".gone.lock", 1)
    (directory / ".new.partial").mkdir()
    assert cache_pruning.prune(40) == 2
    left = sorted(path.name for path in directory.iterdir())
    assert [name for name in left if "lock" not in name] == [".new.partial", "whole"]
    assert ".gone.lock" not in left


def test_packages_and_logs_go_by_file() -> None:
    for kind in ("debs", "logs"):
        (cache.root() / kind).mkdir(parents=True)
        for name, days in (("old", 31), ("young", 1), (".lock", 31)):
            (cache.root() / kind / name).touch()
            _age(cache.root() / kind / name, days)
    assert cache_pruning.prune(30) == 2
    for kind in ("debs", "logs"):
        assert sorted(path.name for path in (cache.root() / kind).iterdir()) == [".lock", "young"]


def test_keep_newest() -> None:
    entries = [_made(f"{days}", days) for days in (5, 1, 3, 0, 4)]
    cache_pruning.keep_newest(entries[0].parent, 2)
    assert [entry.name for entry in entries if entry.exists()] == ["1", "0"]


def test_once_a_day() -> None:
    _made("first", 31)
    cache_pruning.prune_daily()
    second = _made("second", 31)
    assert not second.with_name("first").exists()
    cache_pruning.prune_daily()
    assert second.exists()
    _age(cache.root() / ".pruned", 1.1)
    cache_pruning.prune_daily()
    assert not second.exists()


def test_daily_pruning_of_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "file/cache"))
    cache_pruning.prune_daily()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes_count_shared_files_once() -> None:
    entry = _made("one", 2)
    (cache.entry("other", "two", lambda out: None) / "link").hardlink_to(entry / "part")
    kind, other = cache_pruning.kinds()
    assert (kind.name, kind.entries, other.name, other.entries) == ("kind", 1, "other", 1)
    assert 1 << 20 <= kind.size < (1 << 20) + 65536
    assert other.size < 65536
    assert time.time() - kind.last_used == pytest.approx(2 * DAY, abs=60)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    _made("old", 31)
    _made("young", 1)
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["kind", "2", "2.0"]
    assert lines[-1].endswith(f"in {cache.root()}")
    assert main(["cache", "--prune", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "removed: 1"
    assert lines[2].split()[:3] == ["kind", "1", "1.0"]
    with pytest.raises(SystemExit):
        main(["cache", "--prune", "-1"])
