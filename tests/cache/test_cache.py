"""The cache builds each key once, and holds complete entries only."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pykvm import cache
from pykvm.cache import scratch
from pykvm.host import debian_packages

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]


def test_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.root() == tmp_path / "cache"
    monkeypatch.delenv("PYKVM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg/pykvm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache/pykvm"


def test_key_tells_inputs_apart(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_text("one")
    keys = [
        cache.key("ab", "c"),
        cache.key("a", "bc"),
        cache.key("abc"),
        cache.key(b"abc"),
        cache.key(1),
        cache.key("1"),
        cache.key("one"),
        cache.key(file),
    ]
    file.write_text("two")
    keys.append(cache.key(file))
    assert len(set(keys)) == len(keys)
    assert cache.key("a", 1, b"x", file) == cache.key("a", 1, b"x", file)


def test_an_entry_is_built_once() -> None:
    built = []

    def build(out: Path) -> None:
        assert list(out.iterdir()) == []
        (out / "part").write_text("content")
        built.append(out)

    first = cache.entry("kind", "k1", build)
    assert cache.entry("kind", "k1", build) == first
    assert (first / "part").read_text() == "content"
    assert len(built) == 1
    assert cache.entry("kind", "k2", build) != first
    assert len(built) == 2


def test_a_failed_build_leaves_nothing() -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        cache.entry("kind", "k", fail)
    assert [path.name for path in (cache.root() / "kind").iterdir()] == [".k.lock"]
    entry = cache.entry("kind", "k", lambda out: (out / "whole").touch())
    assert [path.name for path in entry.iterdir()] == ["whole"]


def test_what_a_killed_builder_left_is_removed() -> None:
    partial = cache.root() / "kind/.k.partial"
    partial.mkdir(parents=True)
    (partial / "half").touch()
    entry = cache.entry("kind", "k", lambda out: (out / "whole").touch())
    assert [path.name for path in entry.iterdir()] == ["whole"]
    assert not partial.exists()


def _slow_build(out: Path) -> None:
    with (cache.root() / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.2)
    (out / "pid").write_text(str(os.getpid()))


def _ask(_: int) -> str:
    return (cache.entry("kind", "k", _slow_build) / "pid").read_text()


def test_processes_share_one_build() -> None:
    cache.root().mkdir(parents=True)
    with multiprocessing.Pool(4) as pool:
        answers = pool.map(_ask, range(4), chunksize=1)
    assert len(set(answers)) == 1
    assert (cache.root() / "builds").read_text() == "x"


def test_an_unwritable_cache_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(cache.CacheError, match="set PYKVM_CACHE"):
        cache.entry("kind", "k", lambda out: None)
    with pytest.raises(cache.CacheError, match="set PYKVM_CACHE"):
        cache.log_path("build")
    with pytest.raises(cache.CacheError, match="set PYKVM_CACHE"):
        debian_packages.fetch([debian_packages.Package("a_1_all.deb", 1)])
    with pytest.raises(cache.CacheError, match="set PYKVM_CACHE"), scratch.directory("kind"):
        pass


def test_keys_of_paths_that_are_no_text(tmp_path: Path) -> None:
    assert cache.key("/caf\udcff") != cache.key("/caf\udcfe")
