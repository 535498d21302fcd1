"""Specification of a guest's network by its user: ``--net tap,bridge=br0`` and the like."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pykvm.errors import PykvmError
from pykvm.network.frame_stream import LARGEST_MTU
from pykvm.network.links import InterfaceNameError, check_interface_name
from pykvm.network.mac_address import MacAddressError, parse_mac

__all__ = ["Forward", "NetworkKind", "NetworkSpecification", "NetworkSpecificationError"]

_MTU: Final = (68, LARGEST_MTU)  # RFC 791, 3.2
_QUEUES: Final = (1, 16)
_LOOPBACK: Final = "127.0.0.1"


class NetworkSpecificationError(PykvmError, ValueError):
    """Text that describes no network.

    Args:
        problem: what is wrong in it.
        next_step: how to write it.
    """

    def __init__(self, problem: str, next_step: str) -> None:
        super().__init__(f"--net: {problem}", next_step)


class NetworkKind(StrEnum):
    """The other side of a guest's network device."""

    NONE = "none"
    TAP = "tap"
    USER = "user"


_KEYS: Final = {
    NetworkKind.NONE: (),
    NetworkKind.TAP: ("name", "bridge", "address", "mac", "mtu", "queues", "dhcp"),
    NetworkKind.USER: ("tcp", "udp", "host", "mac", "mtu"),
}


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads to one of the guest.

    Attributes:
        protocol: "tcp" or "udp".
        address: the host's address to listen on; None for all.
        host_port: the host's port.
        guest_port: the guest's port.
    """

    protocol: str
    address: str | None
    host_port: int
    guest_port: int

    @classmethod
    def parse(cls, protocol: str, text: str) -> Forward:
        """Return the forward that ``[ADDRESS:]HOST-PORT[:GUEST-PORT]`` describes.

        It listens on the loopback address alone unless there is an ADDRESS; "*" means all.

        Raises:
            NetworkSpecificationError: it describes none.
        """
        pattern = r"(?:(\*|\d+(?:\.\d+)+):)?(\d{1,5})(?::(\d{1,5}))?"
        found = re.fullmatch(pattern, text, re.ASCII)
        how = f"write {protocol}=HOST-PORT:GUEST-PORT, such as {protocol}=8080:80"
        if found is None:
            raise NetworkSpecificationError(f"{protocol}={text} is no pair of ports", how)
        ports = [int(port) for port in (found[2], found[3] or found[2])]
        if not all(0 < port < 65536 for port in ports):
            raise NetworkSpecificationError(
                f"{protocol}={text}: there is no such port", "use 1 to 65535"
            )
        address = found[1] or _LOOPBACK
        if address != "*" and not _is_address(address):
            raise NetworkSpecificationError(f"{address} is no IPv4 address", how)
        return cls(protocol, None if address == "*" else address, *ports)


@dataclass(frozen=True, slots=True)
class NetworkSpecification:
    """A guest's network as a user wants it.

    Attributes:
        kind: the other side.
        mac: the guest's MAC address; None to derive it from the machine's name.
        mtu: bytes of payload in a frame; None for the other side's.
        name: the TAP's name; None for a free one.
        bridge: the TAP's bridge, see `Tap`.
        address: the host's address on a bridge that is to be made; with its prefix.
        queues: pairs of queues.
        dhcp: whether addresses are handed out on the bridge by DHCP.
        forwards: ports of the host that lead to the guest.
        host: whether the guest reaches the host's loopback address, as its gateway.
    """

    kind: NetworkKind
    mac: str | None = None
    mtu: int | None = None
    name: str | None = None
    bridge: str | None = None
    address: str | None = None
    queues: int = 1
    dhcp: bool = False
    forwards: tuple[Forward, ...] = ()
    host: bool = False

    @classmethod
    def parse(cls, text: str) -> NetworkSpecification:
        """Return the network that a text describes: a kind, and KEY=VALUE after commas.

        Keys of "tap" are name, bridge, address, mac, mtu, queues and dhcp; of "user" tcp and udp,
        as often as needed, host, mac and mtu; "none" has none.

        Raises:
            NetworkSpecificationError: it describes none.
        """
        if not text.isprintable():
            raise NetworkSpecificationError(
                f"{text!r} has characters that cannot be printed", "write it in one line"
            )
        first, *rest = text.split(",")
        try:
            kind = NetworkKind(first)
        except ValueError:
            kinds = ", ".join(NetworkKind)
            raise NetworkSpecificationError(
                f"{first!r} is no kind of network", f"use one of {kinds}"
            ) from None
        values: dict[str, str] = {}
        forwards: list[Forward] = []
        for item in rest:
            key, equals, value = item.partition("=")
            if key not in _KEYS[kind]:
                known = ", ".join(_KEYS[kind]) or "nothing"
                raise NetworkSpecificationError(f"{kind} has no {key!r}", f"it takes {known}")
            if not equals or not value:
                raise NetworkSpecificationError(f"{key} has no value", f"write {key}=VALUE")
            if key in ("tcp", "udp"):
                forwards.append(Forward.parse(key, value))
            elif key in values:
                raise NetworkSpecificationError(f"{key} is there twice", "write it once")
            else:
                values[key] = value
        _require_distinct(forwards)
        return _checked(kind, values, tuple(forwards))


def _checked(
    kind: NetworkKind, values: dict[str, str], forwards: tuple[Forward, ...]
) -> NetworkSpecification:
    try:
        mac = parse_mac(values["mac"]) if "mac" in values else None
        for key in ("name", "bridge"):
            if key in values:
                check_interface_name(values[key])
    except (MacAddressError, InterfaceNameError) as error:
        raise NetworkSpecificationError(error.problem, error.next_step) from error
    address = values.get("address")
    if address is not None and not _is_interface(address):
        raise NetworkSpecificationError(
            f"{address} is no address of a network", "write one such as address=10.187.0.1/24"
        )
    if values.get("bridge") == "none" and ("address" in values or "dhcp" in values):
        raise NetworkSpecificationError("address and dhcp need a bridge", "leave out bridge=none")
    return NetworkSpecification(
        kind=kind,
        mac=mac,
        mtu=_number("mtu", values["mtu"], _MTU) if "mtu" in values else None,
        name=values.get("name"),
        bridge=values.get("bridge"),
        address=address,
        queues=_number("queues", values["queues"], _QUEUES) if "queues" in values else 1,
        dhcp=_switch("dhcp", values.get("dhcp", "off")),
        forwards=forwards,
        host=_switch("host", values.get("host", "off")),
    )


def _number(key: str, text: str, limits: tuple[int, int]) -> int:
    low, high = limits
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
        raise NetworkSpecificationError(f"{key}={text}", f"use a number from {low} to {high}")
    return int(text)


def _switch(key: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise NetworkSpecificationError(f"{key}={text}", f"write {key}=on or {key}=off")
    return text == "on"


def _require_distinct(forwards: list[Forward]) -> None:
    taken: set[tuple[str, int]] = set()
    for one in forwards:
        if (one.protocol, one.host_port) in taken:
            raise NetworkSpecificationError(
                f"{one.protocol} port {one.host_port} of the host leads to two places",
                "write it once",
            )
        taken.add((one.protocol, one.host_port))


def _is_address(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _is_interface(text: str) -> bool:
    try:
        return "/" in text and bool(ipaddress.IPv4Interface(text))
    except ValueError:
        return False
