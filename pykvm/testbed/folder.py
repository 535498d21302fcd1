"""The folder that a run carries into the emulated host, and its files.

The folder has the same path there. By default it is the current folder; inside pykvm's own checkout
it is the whole checkout.
"""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host import git
from pykvm.resources import CHECKOUT
from pykvm.sizes import MIB

__all__ = [
    "FolderMissingError",
    "FolderNameError",
    "FolderPlaceError",
    "FolderTooLargeError",
    "carried_files",
    "current_folder",
    "require_place",
]

MOST_BYTES: Final = 256 * MIB
MOST_FILES: Final = 20_000

_LARGEST_ARTIFACT: Final = 16 * MIB  # largest size of a file below build/
_NEVER: Final = {
    ".git",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    ".pytest_cache",
    "__pycache__",
}

# Directories of the emulated host itself, which a folder mounted over them would hide.
_SYSTEM: Final = (
    "/dev",
    "/etc",
    "/payload",
    "/proc",
    "/run/cache",
    "/run/job",
    "/sys",
    "/usr/bin",
    "/usr/include",
    "/usr/lib",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/share",
)
_VIRTUAL: Final = ("/proc", "/sys")  # no directory can be created in these

_NEXT: Final = "start in the folder of your work, or name one with --folder DIR"


class FolderMissingError(PykvmError):
    """There is no such folder."""


class FolderNameError(PykvmError):
    """A file name that xorriso's list of files cannot hold."""


class FolderPlaceError(PykvmError):
    """The folder's path belongs to the emulated host's own system."""


class FolderTooLargeError(PykvmError):
    """The folder exceeds `MOST_FILES` or `MOST_BYTES`."""


def current_folder() -> Path:
    """Return the folder to carry in by default: pykvm's checkout if this is in it, else this one.

    Raises:
        FolderMissingError: the current folder has been removed.
    """
    try:
        current = Path.cwd()
    except FileNotFoundError as error:
        raise FolderMissingError("the current folder does not exist any more", _NEXT) from error
    if CHECKOUT is not None and current.is_relative_to(CHECKOUT):
        return CHECKOUT
    return current


def require_place(folder: Path) -> None:
    """Check that `folder` exists and can have the same path on the emulated host.

    Raises:
        FolderMissingError: there is no such folder.
        FolderPlaceError: the path belongs to the emulated host's own system.
    """
    if not folder.is_dir():
        raise FolderMissingError(f"there is no folder {folder}", _NEXT)
    hidden = any(Path(path).is_relative_to(folder) for path in _SYSTEM)
    if hidden or any(folder.is_relative_to(path) for path in _VIRTUAL):
        raise FolderPlaceError(f"{folder} belongs to the emulated host's own system", _NEXT)


def carried_files(folder: Path) -> list[str]:
    """Return the files of `folder` that a run carries in, sorted and relative to it.

    In a git checkout these are the files that git tracks, new files that it does not ignore, and
    files below `build/` of at most 16 MiB. Elsewhere they are all files, except virtual
    environments and caches. pykvm's own checkout adds its built extensions and compiled tests.

    Raises:
        FolderTooLargeError: there are more than `MOST_FILES` files or `MOST_BYTES` bytes.
        FolderNameError: a file name has a line break.
    """
    names = set(_limited(folder, _from_git(folder)))
    if names:
        names.update(_limited(folder, _artifacts(folder)))
    else:
        names.update(_limited(folder, _from_walk(folder, folder)))
    if folder == CHECKOUT:
        names.update(_built(folder))
    return sorted(names)


def _limited(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield the files and links among `names`; raise once there are too many or too large ones."""
    files = size = 0
    for name in names:
        try:
            status = os.lstat(folder / name)
        except OSError:  # git lists deleted files too, and any file may vanish meanwhile
            continue
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
            continue
        if "\n" in name:
            raise FolderNameError(f"a file name in {folder} has a line break", f"rename {name!r}")
        files += 1
        size += status.st_size
        if files > MOST_FILES or size > MOST_BYTES:
            limit = f"{MOST_FILES} files" if files > MOST_FILES else f"{MOST_BYTES >> 20} MiB"
            raise FolderTooLargeError(f"{folder} holds more than {limit}", _NEXT)
        yield name


def _from_git(folder: Path) -> Iterator[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-c", "-o", "--exclude-standard"]
    try:
        listing = subprocess.Popen(
            command,
            cwd=folder,
            env=git.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return
    assert listing.stdout is not None
    rest = b""
    try:
        while data := os.read(listing.stdout.fileno(), 1 << 16):
            *complete, rest = (rest + data).split(b"\0")
            yield from map(os.fsdecode, complete)
    finally:  # also when the generator is closed early
        listing.kill()
        listing.stdout.close()
        listing.wait()


def _artifacts(folder: Path) -> Iterator[str]:
    for name in _from_walk(folder / "build", folder):
        with contextlib.suppress(OSError):
            if os.lstat(folder / name).st_size <= _LARGEST_ARTIFACT:
                yield name


def _built(checkout: Path) -> Iterator[str]:
    for pattern in ("pykvm/**/*.so", "tests/**/__pycache__/*-pytest-*.pyc"):
        for path in checkout.glob(pattern):
            yield str(path.relative_to(checkout))


def _from_walk(top: Path, folder: Path) -> Iterator[str]:
    own_cache = str(cache.root())
    for directory, directories, files in os.walk(top):
        directories[:] = [
            name
            for name in directories
            if name not in _NEVER
            and os.path.join(directory, name) != own_cache
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        ]
        links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(directory, name), folder)
