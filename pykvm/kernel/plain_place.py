"""Directories whose paths the kernel's Makefiles can take.

Make splits paths at spaces and colons, and gives quotes, dollars and the like a meaning.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = ["PlaceError", "copy_in_plain_place", "is_plain", "plain_directory"]

_DIRECTORIES = (Path("/tmp"), Path("/var/tmp"))  # where TMPDIR names an odd one
_PLAIN = re.compile(r"[A-Za-z0-9_/.+-]+")


class PlaceError(PykvmError):
    """No directory for temporary files has a path that the kernel's Makefiles can take."""


def is_plain(path: Path) -> bool:
    """Return whether the kernel's Makefiles can take `path`."""
    return _PLAIN.fullmatch(str(path)) is not None


@contextmanager
def plain_directory(parent: Path) -> Iterator[Path]:
    """Yield an empty directory, in `parent` if its path is plain, and remove it afterwards.

    Raises:
        PlaceError: neither `parent` nor a directory for temporary files will do.
    """
    if not is_plain(parent):
        parent = _temporary()
    with tempfile.TemporaryDirectory(prefix="pykvm-", dir=parent) as made:
        yield Path(made)


@contextmanager
def copy_in_plain_place(tree: Path, *, without: str) -> Iterator[Path]:
    """Yield `tree` itself if its path is plain, else a copy that is removed afterwards.

    without: a shell pattern; files of such names are not copied.

    Raises:
        PlaceError: see `plain_directory`.
    """
    if is_plain(tree):
        yield tree
        return
    with plain_directory(tree) as place:
        copy = place / "copy"
        shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns(without))
        yield copy


def _temporary() -> Path:
    for path in (Path(tempfile.gettempdir()), *_DIRECTORIES):
        if is_plain(path) and path.is_dir():
            return path
    raise PlaceError(
        "the kernel's makefiles take no path with spaces, colons, quotes or the like",
        "set TMPDIR to a directory without them",
    )
