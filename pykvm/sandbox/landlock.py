"""Landlock: which files a process may still open, by their places.

What is open already stays as it is. Source: landlock(7), Linux
Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pykvm.resources import CHECKOUT, PACKAGE
from pykvm.sandbox._sandbox import lib
from pykvm.sandbox.confinement import Confinement, SandboxError
from pykvm.sandbox.layers import Layer

__all__ = ["described", "landlock_abi", "landlock_layer", "make_ruleset"]

_NAME: Final = "landlock"

_READ: Final[int] = lib.LANDLOCK_ACCESS_FS_READ_FILE | lib.LANDLOCK_ACCESS_FS_READ_DIR
_REMOVE_DIRECTORY: Final[int] = lib.LANDLOCK_ACCESS_FS_REMOVE_DIR
_CHANGE: Final[int] = (
    _READ
    | lib.LANDLOCK_ACCESS_FS_WRITE_FILE
    | lib.LANDLOCK_ACCESS_FS_TRUNCATE
    | lib.LANDLOCK_ACCESS_FS_MAKE_REG
    | lib.LANDLOCK_ACCESS_FS_MAKE_DIR
    | lib.LANDLOCK_ACCESS_FS_MAKE_SOCK
    | lib.LANDLOCK_ACCESS_FS_REMOVE_FILE
    | lib.LANDLOCK_ACCESS_FS_REMOVE_DIR
    | lib.LANDLOCK_ACCESS_FS_REFER
)
_FILE: Final[int] = (
    lib.LANDLOCK_ACCESS_FS_READ_FILE
    | lib.LANDLOCK_ACCESS_FS_WRITE_FILE
    | lib.LANDLOCK_ACCESS_FS_TRUNCATE
)
"""Rights that a file can have; the others are a directory's."""

_SINCE: Final[dict[int, int]] = {
    2: lib.LANDLOCK_ACCESS_FS_REFER,
    3: lib.LANDLOCK_ACCESS_FS_TRUNCATE,
    5: lib.LANDLOCK_ACCESS_FS_IOCTL_DEV,
}
"""Rights that came after the first ABI."""
_NETWORK: Final[int] = lib.LANDLOCK_ACCESS_NET_BIND_TCP | lib.LANDLOCK_ACCESS_NET_CONNECT_TCP
_NETWORK_SINCE: Final = 4
_SCOPE_SINCE: Final = 6

_LIBRARIES: Final = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/etc/localtime", "/usr/share/zoneinfo", "/proc/meminfo", "/proc/self"),
)
"""Where the C library and Python look for more of themselves, and for this process's memory."""

_process: list[int] = []
"""A descriptor of /proc/self: without one the kernel may make another inode, with no rule."""


def landlock_abi() -> int:
    """Return the version of Landlock's ABI in this kernel, or -errno."""
    return int(lib.sandbox_landlock_abi())


def landlock_layer(abi: int) -> Layer:
    """Return whether this kernel has Landlock, from what `landlock_abi` has returned."""
    if abi > 0:
        return Layer(_NAME, True, f"ABI {abi}")
    if abi == -errno.EOPNOTSUPP:
        return Layer(
            _NAME, False, "it is switched off in this kernel", "boot with lsm=landlock,... first"
        )
    return Layer(_NAME, False, "this kernel has none", "use Linux 5.13 or newer")


def make_ruleset(confinement: Confinement, abi: int) -> int:
    """Return a descriptor of the rules, which a thread can submit to.

    Raises:
        SandboxError: a path of the confinement does not exist, or the kernel refuses a rule.
    """
    ruleset = lib.sandbox_landlock_ruleset(
        _handled(abi),
        _NETWORK if abi >= _NETWORK_SINCE and not _inet(confinement) else 0,
        lib.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET if abi >= _SCOPE_SINCE else 0,
        abi,
    )
    if ruleset < 0:
        raise SandboxError(f"the kernel refuses to make rules ({os.strerror(-ruleset).lower()})")
    try:
        if not _process:
            _process.append(os.open("/proc/self", os.O_PATH | os.O_CLOEXEC))
        for path in _own_paths():
            _allow(ruleset, path, _READ, abi, required=False)
        for path in confinement.readable:
            _allow(ruleset, path, _READ, abi)
        for path in confinement.writable:
            _allow(ruleset, path, _CHANGE, abi)
        if confinement.directory is not None:
            _allow(ruleset, confinement.directory, _CHANGE, abi)
            # Linux removes nothing but empty directories by this right.
            _allow(ruleset, confinement.directory.absolute().parent, _REMOVE_DIRECTORY, abi)
    except BaseException:
        os.close(ruleset)
        raise
    return int(ruleset)


def described(confinement: Confinement, abi: int) -> Layer:
    """Return what the rules of `make_ruleset` do."""
    places = [*confinement.writable]
    if confinement.directory is not None:
        places.insert(0, confinement.directory)
    writes = f"writes {', '.join(map(str, places))}" if places else "writes nothing"
    reads = ", ".join(["Python's own files", *map(str, confinement.readable)])
    lacks = [
        *(["TCP is not seen"] if abi < _NETWORK_SINCE else []),
        *(["abstract sockets are not seen"] if abi < _SCOPE_SINCE else []),
    ]
    return Layer(_NAME, True, "; ".join([f"ABI {abi}: {writes}; reads {reads}", *lacks]))


def _inet(confinement: Confinement) -> bool:
    return not {lib.AF_INET, lib.AF_INET6}.isdisjoint(confinement.families)


def _handled(abi: int) -> int:
    """Return all rights that this ABI knows: those that no rule gives are denied."""
    first: int = 2 * lib.LANDLOCK_ACCESS_FS_MAKE_SYM - 1
    return first | sum(right for since, right in _SINCE.items() if abi >= since)


def _own_paths() -> Iterable[Path]:
    """Return where this Python may load more modules and libraries from."""
    prefixes = (Path(sys.prefix), Path(sys.base_prefix))
    places = [Path(one).absolute() for one in sys.path if one]  # "" is the working directory
    yield from (one for one in places if any(one.is_relative_to(root) for root in prefixes))
    yield from (root / "lib" for root in prefixes)
    yield PACKAGE
    if CHECKOUT is not None:
        yield CHECKOUT / "pyproject.toml"  # has the version
    yield from map(Path, _LIBRARIES)


def _allow(ruleset: int, path: Path, rights: int, abi: int, *, required: bool = True) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if not required:
            return
        raise SandboxError(
            f"{path} cannot be allowed: {(error.strerror or '').lower()}", "check its name"
        ) from error
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE
        result = lib.sandbox_landlock_allow(ruleset, descriptor, rights & _handled(abi))
    finally:
        os.close(descriptor)
    if result and required:
        raise SandboxError(f"{path} cannot be allowed: {os.strerror(-result).lower()}")
