"""pykvm.network.addresses: addresses on a bridge of ours, and dnsmasq itself."""

import ipaddress
import os
import re
import shutil
import signal
import struct
import subprocess
import time

import pytest

from pykvm.network.addresses import (
    AddressesExhaustedError,
    DhcpServer,
    DnsmasqError,
    StaticAddress,
    allocate,
)
from pykvm.network.mac_address import mac_address
from pykvm.network.tap import Tap
from tests.rigs.network_namespace import NetworkNamespace, need_tun

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _tun() -> None:
    need_tun()


@pytest.fixture
def _dnsmasq() -> None:
    if shutil.which("dnsmasq", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("dnsmasq is not installed")


def _allocate(tap: Tap, machine: str) -> StaticAddress:
    assert tap.port is not None
    return allocate(tap.port, machine)


def test_the_kernel_argument() -> None:
    address = StaticAddress(ipaddress.IPv4Interface("10.187.0.7/24"))
    assert address.kernel_argument("web") == "ip=10.187.0.7:::255.255.255.0:web:eth0:off"
    full = StaticAddress(
        ipaddress.IPv4Interface("10.0.2.15/24"),
        ipaddress.IPv4Address("10.0.2.2"),
        tuple(ipaddress.IPv4Address(f"10.0.2.{n}") for n in (3, 4, 5)),
    )
    assert (
        full.kernel_argument(interface="enp0s1")
        == "ip=10.0.2.15::10.0.2.2:255.255.255.0::enp0s1:off:10.0.2.3:10.0.2.4"
    )


def test_machines_have_different_addresses_and_keep_them(namespace: NetworkNamespace) -> None:
    taps = [Tap() for _ in range(12)]
    given = [_allocate(tap, f"machine {n}") for n, tap in enumerate(taps)]
    assert len(set(given)) == 12
    for one in given:
        assert one.address.network == ipaddress.IPv4Network("10.187.0.0/24")
        assert 2 <= int(one.address.ip) & 255 <= 127
    again = _allocate(taps[0], "machine 0")
    assert again == given[0]
    for tap in taps:
        tap.close()
    with Tap() as tap:
        assert _allocate(tap, "machine 0") == given[0]


def test_a_full_network(namespace: NetworkNamespace) -> None:
    with Tap(bridge="tiny", address="10.9.9.1/29") as one, Tap(bridge="tiny") as two:
        assert str(_allocate(one, "a").address) in ("10.9.9.2/29", "10.9.9.3/29")
        third = Tap(bridge="tiny")
        assert _allocate(two, "b") != _allocate(one, "a")
        with pytest.raises(AddressesExhaustedError, match=r"^all addresses of 10.9.9.0/29 on tiny"):
            _allocate(third, "c")
        one.close()
        _allocate(third, "c")
        third.close()


def test_a_bridge_of_the_users_has_its_own_addresses(namespace: NetworkNamespace) -> None:
    subprocess.run(["ip", "link", "add", "br7", "type", "bridge"], check=True)
    with (
        Tap(bridge="br7") as tap,
        pytest.raises(AddressesExhaustedError, match=r"^bridge br7 has no addresses of ours"),
    ):
        _allocate(tap, "a")
    subprocess.run(["ip", "link", "del", "br7"], check=True)


def _discover(tap: Tap, mac: str, name: str = "pc") -> ipaddress.IPv4Address:
    """Ask for an address as a guest behind the TAP does (RFC 2131); return what is offered."""
    client = bytes.fromhex(mac.replace(":", ""))
    bootp = struct.pack(
        "!BBBBIHH4s4s4s4s16s192s4s",
        *(1, 1, 6, 0, 0x1234, 0, 0x8000, bytes(4), bytes(4), bytes(4), bytes(4)),
        *(client, b"", b"\x63\x82\x53\x63"),
    )
    payload = bootp + b"\x35\x01\x01\x37\x02\x01\x03\xff".ljust(60, b"\0")
    udp = struct.pack("!HHHH", 68, 67, 8 + len(payload), 0) + payload
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4
    )
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", checksum) + header[12:]
    question = bytes(12) + b"\xff" * 6 + client + b"\x08\x00" + header + udp
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        os.write(tap.descriptors[0], question)
        for _ in range(12):
            try:
                frame = os.read(tap.descriptors[0], 70000)[12:]
            except BlockingIOError:
                time.sleep(0.01)
                continue
            if frame[34:36] == b"\0\x43" and frame[42 + 28 : 42 + 34] == client:
                options = frame[42 + 240 :]
                assert options[:3] == b"\x35\x01\x02"  # an offer
                assert not re.search(rb"\x03\x04", options)  # and no router
                return ipaddress.IPv4Address(frame[42 + 16 : 42 + 20])
    raise AssertionError("nobody offers an address")


@pytest.mark.usefixtures("_dnsmasq")
def test_dhcp(namespace: NetworkNamespace) -> None:
    with Tap() as one, Tap() as two:
        assert one.port is not None
        assert two.port is not None
        with DhcpServer(one.port) as server:
            assert server.serving
            offered = [_discover(one, mac_address(name)) for name in ("a", "b", "a")]
            assert offered[0] == offered[2] != offered[1]
            assert all(128 <= int(address) & 255 <= 254 for address in offered)
            with DhcpServer(two.port) as idle:
                assert (idle.serving, idle.fd, idle.complaint()) == (False, -1, "")
            assert _discover(two, mac_address("b")) == offered[1]
            assert server.complaint() == ""
        with DhcpServer(two.port) as server:
            assert server.serving  # it takes over
            assert _discover(one, mac_address("b")) == offered[1]


@pytest.mark.usefixtures("_dnsmasq")
def test_two_bridges_have_a_server_each(namespace: NetworkNamespace) -> None:
    with Tap() as one, Tap(bridge="lab", address="10.9.0.1/24") as two:
        assert one.port is not None
        assert two.port is not None
        with DhcpServer(one.port), DhcpServer(two.port) as second:
            assert second.serving
            assert str(_discover(one, mac_address("a"))).startswith("10.187.0.")
            assert str(_discover(two, mac_address("a"))).startswith("10.9.0.")


@pytest.mark.usefixtures("_dnsmasq")
def test_dnsmasq_is_killed(namespace: NetworkNamespace) -> None:
    with Tap() as tap:
        assert tap.port is not None
        with DhcpServer(tap.port) as server:
            assert server._child is not None
            os.kill(server._child.pid, signal.SIGKILL)
            assert server._child.wait(5)
            assert server.complaint().startswith("dnsmasq has ended: ")


def test_dnsmasq_is_missing(namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with Tap() as tap:
        assert tap.port is not None
        with pytest.raises(DnsmasqError, match=r"not installed: type `.*install dnsmasq-base`$"):
            DhcpServer(tap.port)


def test_a_bridge_without_an_address(namespace: NetworkNamespace) -> None:
    with Tap(bridge="plain") as tap:
        assert tap.port is not None
        with pytest.raises(AddressesExhaustedError, match=r"^bridge plain has no addresses of"):
            DhcpServer(tap.port)
