"""Network namespaces, in which tests make interfaces without touching this machine's."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

from pykvm.network.links import Link, links, netlink
from tests.rigs.tiers import NOT_ALLOWED

_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.unshare is there since Python 3.12
_LIBC = ctypes.CDLL(None, use_errno=True)


class NetworkNamespace:
    """A network namespace of its own, with its loopback interface up.

    The test is skipped where this user may not make one.
    """

    def __init__(self) -> None:
        before = _current()
        try:
            if _LIBC.unshare(_CLONE_NEWNET):
                pytest.skip(f"{NOT_ALLOWED}network namespaces: {os.strerror(ctypes.get_errno())}")
            self.fd = _current()
            with netlink("switch on lo") as route:
                route.link("set", index=1, state="up")
        finally:
            _enter(before)
            os.close(before)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it, with this thread alone and those that it starts."""
        before = _current()
        _enter(self.fd)
        try:
            yield
        finally:
            _enter(before)
            os.close(before)

    def interfaces(self) -> dict[str, Link]:
        """Return its interfaces by name."""
        with self.entered(), netlink("list interfaces") as route:
            return {link.name: link for link in links(route)}

    def close(self) -> None:
        os.close(self.fd)


def need_tun() -> None:
    """Skip the test if this kernel has no TAPs."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"{NOT_ALLOWED}TAPs (/dev/net/tun): {error.strerror}")


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
