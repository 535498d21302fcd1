"""Files of 4 KiB pages that get huge pages, as far as the kernel can."""

import os
from pathlib import Path

import pytest

from pykvm.memory import huge_pages
from pykvm.memory.huge_pages import collapse
from pykvm.memory.regions import HUGE_2M, MemoryFile, Region

pytestmark = pytest.mark.unit


def test_contents_stay() -> None:
    size = 3 * HUGE_2M + 4096
    with MemoryFile("memory", size) as file, Region(file, 0) as region:
        region.view(HUGE_2M - 4, 8)[:] = b"contents"
        region.view(size - 3)[:] = b"end"
        descriptors = len(os.listdir("/proc/self/fd"))
        collapse(file)
        assert bytes(region.view(HUGE_2M - 4, 8)) == b"contents"
        assert bytes(region.view(size - 3)) == b"end"
        assert not any(region.view(0, 4096))
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("size", [4096, HUGE_2M - 4096])
def test_a_small_file_needs_none(size: int) -> None:
    with MemoryFile("memory", size) as file:
        assert collapse(file)


def test_the_file_is_mapped_no_longer() -> None:
    with MemoryFile("a-name-of-its-own", HUGE_2M) as file:
        collapse(file)
        assert "a-name-of-its-own" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("call", ["mmap", "madvise"])
def test_where_the_kernel_refuses(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages stay small; nothing else changes."""

    class Refusing:
        munmap = staticmethod(huge_pages._libc.munmap)
        mmap = staticmethod(huge_pages._libc.mmap)
        madvise = staticmethod(huge_pages._libc.madvise)

    refused = -1 if call == "madvise" else huge_pages._FAILED
    monkeypatch.setattr(Refusing, call, staticmethod(lambda *_: refused))
    monkeypatch.setattr(huge_pages, "_libc", Refusing)
    with MemoryFile("memory", HUGE_2M) as file, Region(file, 0) as region:
        assert not collapse(file)
        region.view(0, 1)[:] = b"x"


def test_a_closed_file() -> None:
    file = MemoryFile("memory", HUGE_2M)
    file.close()
    with pytest.raises(ValueError, match="create it again"):
        collapse(file)
