"""Bridges: a port in one of ours, which comes and goes with its ports, or in one of the user's.

A bridge of ours bears the alias "pykvm". It is made for its first port and removed after its last
one, whichever processes these belong to.

Source: Linux Documentation/networking/bridge.rst, net/bridge/br_if.c.
"""

from __future__ import annotations

import errno
import ipaddress
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.network.bridge_remover import BridgeRemover
from pykvm.network.links import (
    Link,
    NetworkError,
    NetworkPrivilegeError,
    check_interface_name,
    find_link,
    links,
    namespace_lock,
    netlink,
)
from pykvm.network.mac_address import mac_address

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_BRIDGE",
    "BridgeAddressError",
    "BridgePort",
    "NotABridgeError",
]

DEFAULT_BRIDGE: Final = "pykvm0"
DEFAULT_ADDRESS: Final = "10.187.0.1/24"
"""Address of the host on `DEFAULT_BRIDGE`."""

_OURS: Final = "pykvm"


class NotABridgeError(PykvmError, ValueError):
    """An interface that has no ports because it is no bridge."""


class BridgeAddressError(PykvmError, ValueError):
    """An address that a bridge cannot have."""


class BridgePort(Closeable):
    """Membership of an interface in a bridge.

    Attributes:
        bridge: the bridge's name.
        index: the bridge's interface number.
        port: interface number of the port.
        ours: whether the bridge comes and goes with its ports.
        address: the host's IPv4 address on the bridge, with its prefix; None if it has none.
        mtu: the bridge's MTU, which the port has been given.

    Args:
        port: interface number of the port.
        bridge: the bridge's name; it is made if there is no such interface.
        address: the host's address on a bridge of ours, such as "10.187.0.1/24".
        mtu: the port's MTU; by default the bridge's, which otherwise would sink to the port's.

    Raises:
        NotABridgeError: the interface exists and is no bridge.
        BridgeAddressError: it is no address, or lies in another interface's network, or is wanted
            on a bridge that exists and has another one.
        NetworkPrivilegeError, NetworkError: the kernel refuses.
    """

    def __init__(
        self,
        port: int,
        bridge: str = DEFAULT_BRIDGE,
        *,
        address: str | None = None,
        mtu: int | None = None,
    ) -> None:
        self.bridge = check_interface_name(bridge)
        self.port = port
        self._closed = False
        self._remover: BridgeRemover | None = None
        wanted = None if address is None else _interface(address)
        with namespace_lock(), netlink(f"join bridge {bridge}") as route:
            found = find_link(route, bridge)
            made = found is None
            if found is None:
                found = self._create(route, wanted)
            try:
                self._join(route, found, wanted, mtu)
            except BaseException:
                if made:
                    route.link("del", index=found.index)
                raise
            if self.ours:
                name = next(link.name for link in links(route) if link.index == port)
                self._remover = BridgeRemover(bridge, name, _OURS)

    def close(self) -> None:
        """Leave the bridge; remove it if it is ours and this was its last port.

        Where this process has given up its privileges meanwhile, another one removes it, which was
        started before. That one does so, too, when this process is killed.

        Raises:
            NetworkError: the kernel refuses for another reason.
        """
        if self._closed or self.inherited:
            return
        self._closed = True
        try:
            self._leave()
        except NetworkPrivilegeError:
            if self._remover is not None:
                self._remover.remove()
        finally:
            if self._remover is not None:
                self._remover.close()

    def _leave(self) -> None:
        with namespace_lock(), netlink(f"leave bridge {self.bridge}") as route:
            present = links(route)
            bridge = next((one for one in present if one.index == self.index), None)
            if bridge is None or bridge.name != self.bridge:
                return
            ports = {one.index for one in present if one.master == self.index}
            if self.port in ports:
                route.link("set", index=self.port, master=0)
            if bridge.alias == _OURS and not ports - {self.port}:
                route.link("del", index=self.index)

    def _create(self, route: Any, address: ipaddress.IPv4Interface | None) -> Link:
        if address is not None:
            _require_free(route, address)
        # Without an address of its own a bridge takes its lowest port's, and changes it with them.
        own = mac_address(f"bridge {self.bridge}")
        route.link("add", ifname=self.bridge, kind="bridge", address=own)
        made = find_link(route, self.bridge)
        if made is None:
            raise NetworkError(f"find the new bridge {self.bridge}", errno.ENODEV)
        try:
            route.link("set", index=made.index, ifalias=_OURS, state="up")
            if address is not None:
                route.addr(
                    "add",
                    index=made.index,
                    address=str(address.ip),
                    prefixlen=address.network.prefixlen,
                )
        except BaseException:
            route.link("del", index=made.index)
            raise
        return Link(made.index, made.name, "bridge", _OURS, made.mtu, 0, True, {})

    def _join(
        self, route: Any, bridge: Link, wanted: ipaddress.IPv4Interface | None, mtu: int | None
    ) -> None:
        if bridge.kind != "bridge":
            raise NotABridgeError(
                f"{bridge.name} exists and is no bridge", "name a bridge, or one to be made"
            )
        self.index = bridge.index
        self.ours = bridge.alias == _OURS
        addresses = [address for index, address in _addresses(route) if index == bridge.index]
        if wanted is not None and wanted not in addresses:
            has = ", ".join(map(str, addresses)) or "no address"
            raise BridgeAddressError(
                f"bridge {bridge.name} exists and has {has}, not {wanted}",
                "leave out the address, or name another bridge",
            )
        self.address = str(addresses[0]) if addresses else None
        self.mtu = bridge.mtu if mtu is None else mtu
        route.link("set", index=self.port, mtu=self.mtu)
        route.link("set", index=self.port, master=bridge.index)


def _interface(text: str) -> ipaddress.IPv4Interface:
    """Return the address that is to be given to a bridge."""
    try:
        address = ipaddress.IPv4Interface(text)
    except ValueError:
        address = None
    if address is None or "/" not in text or address.network.prefixlen > 30:
        raise BridgeAddressError(
            f"{text!r} is no IPv4 address of a network", f"write one such as {DEFAULT_ADDRESS}"
        )
    if address.ip in (address.network.network_address, address.network.broadcast_address):
        raise BridgeAddressError(
            f"{text} is the network itself, or its broadcast",
            f"use an address inside it, such as {address.network[1]}/{address.network.prefixlen}",
        )
    return address


def _require_free(route: Any, address: ipaddress.IPv4Interface) -> None:
    """Check that no interface of this machine lies in the address's network."""
    names = {link.index: link.name for link in links(route)}
    for index, other in _addresses(route):
        if other.network.overlaps(address.network):
            raise BridgeAddressError(
                f"{address.network} overlaps {other.network} on {names.get(index, index)}",
                "choose another address for the bridge",
            )


def _addresses(route: Any) -> list[tuple[int, ipaddress.IPv4Interface]]:
    """Return the IPv4 addresses of this machine, each with its interface's number."""
    found = []
    for message in route.get_addr(family=2):
        # IFA_ADDRESS is the peer's on a point-to-point link.
        own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        found.append((message["index"], ipaddress.IPv4Interface(f"{own}/{message['prefixlen']}")))
    return found
