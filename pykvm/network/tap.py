"""TAPs: network interfaces of this machine whose wire is a file descriptor.

Sources: Linux Documentation/networking/tuntap.rst, drivers/net/tun.c (tun_set_iff);
VIRTIO 1.2, 5.1.6 for the header in front of each frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from enum import IntFlag
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.host.commands import as_root
from pykvm.network._tun import lib
from pykvm.network.bridge import DEFAULT_ADDRESS, DEFAULT_BRIDGE, BridgePort
from pykvm.network.links import (
    Link,
    NetworkError,
    NetworkPrivilegeError,
    check_interface_name,
    find_link,
    netlink,
)

__all__ = ["NO_BRIDGE", "VNET_HEADER_SIZE", "Offload", "Tap", "TapExistsError", "TunMissingError"]

NO_BRIDGE: Final = "none"
"""`bridge` of a TAP that is to be no port."""

VNET_HEADER_SIZE: Final = 12
"""Bytes of struct virtio_net_hdr_v1 in front of each frame."""

_DEVICE: Final = "/dev/net/tun"
_AUTOMATIC: Final = "pykvm-tap%d"  # the kernel puts a number
_FLAGS: Final[int] = lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR
_IFREQ: Final = "16sH22x"  # struct ifreq: a name, and its flags in a union of 24 bytes


class Offload(IntFlag):
    """Work on a frame that its sender may leave to the reader of a TAP.

    Source: ``TUN_F_*`` in linux/if_tun.h.
    """

    CSUM = lib.TUN_F_CSUM
    TSO4 = lib.TUN_F_TSO4
    TSO6 = lib.TUN_F_TSO6
    TSO_ECN = lib.TUN_F_TSO_ECN


class TunMissingError(PykvmError, FileNotFoundError):
    """This kernel has no driver for TAPs."""


class TapExistsError(PykvmError, FileExistsError):
    """An interface of the wanted name exists and is not for this process to use."""


class Tap(Closeable):
    """A TAP, and its port in a bridge.

    It is gone after `close`, and after the process's death: the kernel removes it with its last
    descriptor. A persistent TAP that was made for this user beforehand can be used by its name:
    that needs no privileges, and it stays.

    Attributes:
        name: the interface's name.
        index: its number.
        descriptors: one for each queue, non-blocking; each frame has a struct virtio_net_hdr_v1
            (little endian) in front.
        mtu: bytes of payload in a frame.
        offloads: what `set_offloads` takes.
        port: the port in a bridge; None if there is none.

    Args:
        name: the interface's name; None for a free one.
        queues: pairs of queues.
        mtu: the interface's MTU; None for the bridge's, or 1500.
        bridge: a bridge to put it into, which is made if there is none of the name. None means
            `DEFAULT_BRIDGE` with `DEFAULT_ADDRESS`, but leaves a persistent TAP where it is.
            `NO_BRIDGE` for none.
        address: the host's address on the bridge, see `BridgePort`.

    Raises:
        TunMissingError: this kernel has no TAPs.
        TapExistsError: the name is taken: no TAP, somebody else's, or in use.
        InterfaceNameError: the name cannot be one.
        NetworkPrivilegeError: this user may not.
        NotABridgeError, BridgeAddressError, NetworkBusyError, NetworkError: see `BridgePort`.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        queues: int = 1,
        mtu: int | None = None,
        bridge: str | None = None,
        address: str | None = None,
    ) -> None:
        self.descriptors: tuple[int, ...] = ()
        self.port: BridgePort | None = None
        self.offloads = Offload(0)
        if name is not None:
            check_interface_name(name)
        try:
            self._persistent = not self._create(name, queues)
            self._set_up()
            if bridge is None and not self._persistent:
                bridge, address = DEFAULT_BRIDGE, address or DEFAULT_ADDRESS
            self._connect(bridge, address, mtu)
        except BaseException:
            self.close()
            raise

    def set_offloads(self, offloads: Offload) -> None:
        """Say which unfinished frames the reader of the descriptors takes.

        Args:
            offloads: checksums that are missing, TCP segments that are too large; segments need
                checksums.

        Raises:
            NetworkError: the kernel does not have all of them.
        """
        self.require_own(f"offloads of {self.name}")
        for descriptor in self.descriptors:
            try:
                fcntl.ioctl(descriptor, lib.TUNSETOFFLOAD, int(offloads))
            except OSError as error:
                raise NetworkError(f"set the offloads of {self.name}", error.errno or 0) from error

    def close(self) -> None:
        """Close the descriptors, by which the interface goes, and leave the bridge."""
        descriptors, self.descriptors = self.descriptors, ()
        for descriptor in descriptors:
            os.close(descriptor)
        port, self.port = self.port, None
        if port is not None:
            port.close()

    def _create(self, name: str | None, queues: int) -> bool:
        """Open all queues; return False if the TAP was there already."""
        flags = _FLAGS | (lib.IFF_MULTI_QUEUE if queues > 1 else 0)
        try:
            self.name = self._open(name or _AUTOMATIC, flags | lib.IFF_TUN_EXCL)
        except NetworkError as error:
            if error.errno != errno.EBUSY or name is None:
                raise
            flags = self._persistent_flags(name, queues)
            self.name = self._open(name, flags)
            made = False
        else:
            made = True
        for _ in range(1, queues):
            self._open(self.name, flags)
        return made

    def _open(self, name: str, flags: int) -> str:
        """Open a queue of the TAP of this name, which may be a pattern; return its name."""
        try:
            descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise TunMissingError(
                    f"no {_DEVICE} here", f"type `{as_root('modprobe tun')}`, or use --net user"
                ) from error
            raise NetworkPrivilegeError(f"open {_DEVICE}", error.errno or 0) from error
        self.descriptors += (descriptor,)
        request = struct.pack(_IFREQ, os.fsencode(name), flags)
        try:
            answer = fcntl.ioctl(descriptor, lib.TUNSETIFF, request)
        except OSError as error:
            os.close(descriptor)
            self.descriptors = self.descriptors[:-1]
            what = "make a TAP" if name == _AUTOMATIC else f"make TAP {name}"
            if error.errno == errno.EPERM:
                raise NetworkPrivilegeError(what) from error
            raise NetworkError(what, error.errno or 0) from error
        given: bytes = struct.unpack(_IFREQ, answer)[0]
        return os.fsdecode(given.rstrip(b"\0"))

    def _persistent_flags(self, name: str, queues: int) -> int:
        """Return the flags to open this user's persistent TAP with.

        Raises:
            TapExistsError: the interface is none.
        """
        other_name = "choose another name"
        with netlink(f"look at {name}") as route:
            link = find_link(route, name)
        tun = link.tun if link is not None else {}
        if tun.get("TYPE") != lib.IFF_TAP:
            raise TapExistsError(f"{name} exists and is no TAP", other_name)
        if not tun.get("PERSIST"):
            raise TapExistsError(f"{name} exists: it is another process's TAP", other_name)
        if tun.get("OWNER") != os.geteuid():
            user = os.environ.get("USER", str(os.geteuid()))
            command = as_root(f"ip tuntap add dev {name} mode tap user {user}")
            raise TapExistsError(
                f"{name} exists and is not this user's TAP",
                f"{other_name}, or remove it and type `{command}`",
            )
        multiple = bool(tun.get("MULTI_QUEUE"))
        if queues > 1 and not multiple:
            raise TapExistsError(f"{name} exists and has one queue", "ask for one, or another TAP")
        if tun.get("NUM_QUEUES") or tun.get("NUM_DISABLED_QUEUES"):
            raise TapExistsError(f"{name} is in use by another process", other_name)
        return _FLAGS | (lib.IFF_MULTI_QUEUE if multiple else 0)

    def _set_up(self) -> None:
        """Agree on the format of the header, and learn what may be left undone in a frame."""
        word = struct.Struct("i")
        try:
            for descriptor in self.descriptors:
                fcntl.ioctl(descriptor, lib.TUNSETVNETHDRSZ, word.pack(VNET_HEADER_SIZE))
                fcntl.ioctl(descriptor, lib.TUNSETVNETLE, word.pack(1))
        except OSError as error:
            raise NetworkError(f"set the header of {self.name}", error.errno or 0) from error
        for offloads in (~Offload(0), Offload.CSUM):
            with contextlib.suppress(NetworkError):
                self.set_offloads(offloads)
                self.offloads = offloads
                break
        self.set_offloads(Offload(0))  # until a driver says what it takes

    def _connect(self, bridge: str | None, address: str | None, mtu: int | None) -> None:
        """Put the interface into the bridge and switch it on."""
        with netlink(f"switch on {self.name}") as route:
            link = self._link(route)
            self.index, self.mtu = link.index, link.mtu
            if bridge not in (None, NO_BRIDGE):
                self.port = BridgePort(link.index, bridge, address=address, mtu=mtu)
                self.mtu = self.port.mtu
            elif mtu is not None and mtu != link.mtu:
                route.link("set", index=link.index, mtu=mtu)
                self.mtu = mtu
            if not link.up:
                route.link("set", index=link.index, state="up")

    def _link(self, route: Any) -> Link:
        link = find_link(route, self.name)
        if link is None:
            raise NetworkError(f"find TAP {self.name}", errno.ENODEV)
        return link

    def __repr__(self) -> str:
        return f"<Tap {self.name}{' closed' * (not self.descriptors)}>"
