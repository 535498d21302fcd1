"""Network interfaces of this machine, by netlink.

pyroute2 takes longer to import than the rest of pykvm, so it is imported by the first call.

Sources: rtnetlink(7), netdevice(7), Linux net/core/dev.c (dev_valid_name).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.host.commands import again_as_root

__all__ = [
    "InterfaceNameError",
    "Link",
    "NetworkBusyError",
    "NetworkError",
    "NetworkPrivilegeError",
    "check_interface_name",
    "find_link",
    "links",
    "namespace_lock",
    "netlink",
]

_NAME_SIZE: Final = 16  # IFNAMSIZ, with the terminating zero
_IFF_UP: Final = 1  # linux/if.h
_LOCK_SECONDS: Final = 10.0


class NetworkError(PykvmError, OSError):
    """The kernel refuses to change its network.

    Attributes:
        errno: the kernel's reason.
    """

    def __init__(self, what: str, number: int, next_step: str = "") -> None:
        reason = os.strerror(number).lower()
        super().__init__(f"cannot {what}: {reason}", next_step)
        self.errno = number


class NetworkPrivilegeError(NetworkError, PermissionError):
    """A change of the network for which this user lacks CAP_NET_ADMIN."""

    def __init__(self, what: str, number: int = errno.EPERM) -> None:
        super().__init__(what, number, f"{again_as_root()}, or use --net user")


class InterfaceNameError(PykvmError, ValueError):
    """A name that no network interface can have."""


class NetworkBusyError(PykvmError, TimeoutError):
    """Another process changes bridges of this network namespace and does not finish."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as netlink describes it.

    Attributes:
        index: its number.
        name: its name.
        kind: driver, such as "bridge" or "tun"; empty for hardware.
        alias: its description; empty if it has none.
        mtu: bytes of payload in a frame.
        master: index of the bridge that it is a port of, or 0.
        up: whether it is switched on.
        tun: ``IFLA_TUN_*`` attributes of a TUN or TAP by their names without prefix.
    """

    index: int
    name: str
    kind: str
    alias: str
    mtu: int
    master: int
    up: bool
    tun: dict[str, int]


def check_interface_name(name: str) -> str:
    """Return `name` if the kernel takes it.

    Raises:
        InterfaceNameError: it does not, or would make another name of it ("%d").
    """
    size = len(os.fsencode(name))
    if size >= _NAME_SIZE:
        raise InterfaceNameError(
            f"the interface name {name!r} has {size} bytes", f"use at most {_NAME_SIZE - 1}"
        )
    unusable = any(c.isspace() or not c.isprintable() or c in "/:%," for c in name)
    if not name or name in (".", "..") or unusable:
        raise InterfaceNameError(
            f"{name!r} cannot be the name of an interface", "use letters, digits, '-' and '_'"
        )
    return name


@contextmanager
def netlink(what: str) -> Iterator[Any]:
    """Yield a pyroute2.IPRoute of the calling thread's network namespace.

    Args:
        what: what is to be done, for messages: "add bridge br0".

    Raises:
        NetworkPrivilegeError: this user may not.
        NetworkError: the kernel refuses it for another reason.
    """
    try:
        # A confined process has no such sockets, and IPRoute's failure would be a noisy one.
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE).close()
    except PermissionError as error:
        raise NetworkPrivilegeError(what, error.errno or 0) from error
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        if error.code in (errno.EPERM, errno.EACCES):
            raise NetworkPrivilegeError(what, error.code) from error
        raise NetworkError(what, error.code) from error


def links(route: Any) -> list[Link]:
    """Return all interfaces of the namespace."""
    return [_link(message) for message in route.get_links()]


def find_link(route: Any, name: str) -> Link | None:
    """Return the interface of this name, or None."""
    return next((link for link in links(route) if link.name == name), None)


@contextmanager
def namespace_lock() -> Iterator[None]:
    """Keep other processes of this kind from changing the namespace's bridges.

    The lock is one of flock(2) on the network namespace itself: it needs no file and no rights, and
    processes in other namespaces have another one.

    Raises:
        NetworkBusyError: somebody else holds it for long.
        NetworkPrivilegeError: this process may not even look at it.
    """
    try:
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise NetworkPrivilegeError("lock the network", error.errno or 0) from error
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NetworkBusyError(
                        f"another process changes bridges for more than {_LOCK_SECONDS:g} s",
                        "see who it is with `lsof /proc/self/ns/net`",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)  # unlocks


def _link(message: Any) -> Link:
    information = message.get_attr("IFLA_LINKINFO")
    kind = information and information.get_attr("IFLA_INFO_KIND")
    data = information.get_attr("IFLA_INFO_DATA") if kind == "tun" else None
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind or "",
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        master=message.get_attr("IFLA_MASTER") or 0,
        up=bool(message["flags"] & _IFF_UP),
        tun={key.removeprefix("IFLA_TUN_"): value for key, value in data["attrs"]} if data else {},
    )
