"""IPv4 addresses for guests: one that is written on a kernel's command line, or DHCP by dnsmasq.

On a bridge of ours the lower half of the network is for addresses on command lines. Each is noted
in the alias of the TAP that has it, so that all processes agree, and a TAP that goes frees it. The
upper half is dnsmasq's.

Sources: Linux Documentation/admin-guide/nfs/nfsroot.rst (``ip=``), dnsmasq(8).
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import shutil
import socket
from dataclasses import dataclass
from typing import Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError
from pykvm.host.commands import as_root
from pykvm.network.bridge import BridgePort
from pykvm.network.child_process import ChildProcess
from pykvm.network.links import links, namespace_lock, netlink

__all__ = ["AddressesExhaustedError", "DhcpServer", "DnsmasqError", "StaticAddress", "allocate"]

_MARK: Final = "pykvm "


class AddressesExhaustedError(PykvmError):
    """A bridge's network has no address left, or the bridge has none."""


class DnsmasqError(PykvmError):
    """dnsmasq is missing, does not start, or has ended."""


@dataclass(frozen=True, slots=True)
class StaticAddress:
    """An address that a guest is told on its kernel's command line.

    Attributes:
        address: the guest's address and network.
        gateway: where other networks are reached; None if they are not.
        resolvers: at most two DNS servers.
    """

    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address | None = None
    resolvers: tuple[ipaddress.IPv4Address, ...] = ()

    def kernel_argument(self, host_name: str = "", interface: str = "eth0") -> str:
        """Return the ``ip=`` that says so; the initramfs reads it if the kernel does not.

        Args:
            host_name: the guest's name.
            interface: the guest's name of its interface.
        """
        gateway = self.gateway or ""
        parts = [self.address.ip, "", gateway, self.address.netmask, host_name, interface, "off"]
        return "ip=" + ":".join(map(str, [*parts, *self.resolvers[:2]]))


def allocate(port: BridgePort, machine: str) -> StaticAddress:
    """Return a free address for the guest behind a port of a bridge of ours.

    A machine gets the same one as the last time if nobody has it. It is freed when the TAP goes.

    Args:
        port: the TAP's port.
        machine: the machine's name.

    Raises:
        AddressesExhaustedError: there is none.
        NetworkPrivilegeError, NetworkBusyError, NetworkError: the kernel refuses.
    """
    host = _host(port)
    network = host.network
    first, end = int(network[1]), int(network[network.num_addresses // 2])
    wanted = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:8], "big")
    with namespace_lock(), netlink(f"note an address of {port.bridge}") as route:
        ports = [link for link in links(route) if link.master == port.index]
        taken = {int(host.ip)}
        for link in ports:
            if link.alias.startswith(_MARK) and link.index != port.port:
                with contextlib.suppress(ValueError):
                    taken.add(int(ipaddress.IPv4Address(link.alias.removeprefix(_MARK))))
        for offset in range(min(end - first, len(taken) + 1)):
            address = first + (wanted + offset) % (end - first)
            if address not in taken:
                found = ipaddress.IPv4Address(address)
                route.link("set", index=port.port, ifalias=f"{_MARK}{found}")
                return StaticAddress(ipaddress.IPv4Interface(f"{found}/{network.prefixlen}"))
    raise AddressesExhaustedError(
        f"all addresses of {network} on {port.bridge} are taken", "use another bridge"
    )


class DhcpServer(Closeable):
    """DHCP for the guests on a bridge of ours, by dnsmasq.

    One process serves a bridge. Others' servers do nothing; if the one that serves has gone, the
    next one that is made takes over, and guests keep their addresses, which follow from their MAC
    addresses.

    Attributes:
        serving: whether this is the one.

    Args:
        port: a port of the bridge.

    Raises:
        AddressesExhaustedError: the bridge has no address.
        DnsmasqError: dnsmasq is not installed or does not start.
    """

    def __init__(self, port: BridgePort) -> None:
        host = _host(port)
        self._child: ChildProcess | None = None
        # An abstract address belongs to the network namespace, and goes with its last descriptor.
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._claim.bind(f"\0pykvm-dhcp-{port.bridge}")
        except OSError:
            self._claim.close()
        self.serving = self._claim.fileno() >= 0
        if not self.serving:
            return
        try:
            self._start(port.bridge, host)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """A pidfd of dnsmasq, readable after its end; -1 if this is not the one that serves."""
        return self._child.fd if self._child is not None else -1

    def complaint(self) -> str:
        """Return why dnsmasq has ended; empty while it runs."""
        if self._child is None or self._child.alive:
            return ""
        return f"dnsmasq has ended: {self._child.complaint() or 'it does not say why'}"

    def close(self) -> None:
        """End dnsmasq."""
        if self._child is not None:
            self._child.close()
        self._claim.close()

    def _start(self, bridge: str, host: ipaddress.IPv4Interface) -> None:
        program = shutil.which("dnsmasq", path="/usr/sbin:/usr/local/sbin:/usr/bin:/bin")
        if program is None:
            raise DnsmasqError(
                "dhcp=on needs dnsmasq, which is not installed",
                f"type `{as_root('apt-get install dnsmasq-base')}`",
            )
        network = host.network
        first, last = network[network.num_addresses // 2], network[-2]
        self._child = ChildProcess(
            [
                program,
                *("--keep-in-foreground", "--conf-file=/dev/null", "--log-facility=-"),
                *("--quiet-dhcp", "--no-hosts", "--no-resolv", "--no-ping", "--port=0"),
                *("--pid-file=", "--leasefile-ro", "--dhcp-authoritative"),
                *(f"--interface={bridge}", "--except-interface=lo", "--bind-interfaces"),
                f"--dhcp-range={first},{last},{network.netmask},12h",
                # The host does not forward: no router, no resolver.
                *("--dhcp-option=option:router", "--dhcp-option=option:dns-server"),
            ]
        )
        while not self._child.complaint().startswith("dnsmasq-dhcp"):
            if self._child.wait(0.01):
                raise DnsmasqError(f"dnsmasq does not start: {self._child.complaint()}")


def _host(port: BridgePort) -> ipaddress.IPv4Interface:
    """Return the host's address on the bridge."""
    if port.address is None or not port.ours:
        raise AddressesExhaustedError(
            f"bridge {port.bridge} has no addresses of ours to hand out",
            "use its own DHCP server, or a bridge that pykvm makes, with an address",
        )
    return ipaddress.IPv4Interface(port.address)
