"""pykvm.network.specification and mac_address: what users write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import PykvmError
from pykvm.network.mac_address import MacAddressError, mac_address, parse_mac
from pykvm.network.specification import (
    Forward,
    NetworkKind,
    NetworkSpecification,
    NetworkSpecificationError,
)

pytestmark = pytest.mark.unit

parse = NetworkSpecification.parse


def test_kinds() -> None:
    assert parse("none") == NetworkSpecification(NetworkKind.NONE)
    assert parse("tap") == NetworkSpecification(NetworkKind.TAP)
    assert parse("user") == NetworkSpecification(NetworkKind.USER)


def test_a_tap() -> None:
    text = "tap,bridge=br0,mac=52-54-00-AB-CD-EF,name=t0,mtu=9000,queues=2"
    assert parse(text) == NetworkSpecification(
        NetworkKind.TAP, mac="52:54:00:ab:cd:ef", mtu=9000, name="t0", bridge="br0", queues=2
    )
    made = parse("tap,bridge=lab,address=10.9.0.1/16,dhcp=on")
    assert (made.address, made.dhcp) == ("10.9.0.1/16", True)


def test_forwards() -> None:
    made = parse("user,tcp=8080:80,tcp=*:22:2222,udp=192.0.2.7:53,tcp=9,host=on")
    assert made.host
    assert made.forwards == (
        Forward("tcp", "127.0.0.1", 8080, 80),
        Forward("tcp", None, 22, 2222),
        Forward("udp", "192.0.2.7", 53, 53),
        Forward("tcp", "127.0.0.1", 9, 9),
    )
    both = parse("user,tcp=53,udp=53")
    assert len(both.forwards) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no kind of network: use one of none, tap, user"),
        ("tap0", "'tap0' is no kind of network: use one of none, tap, user"),
        ("none,mac=02:00:00:00:00:01", "none has no 'mac': it takes nothing"),
        ("tap,", "tap has no '': it takes name, bridge, address, mac, mtu, queues, dhcp"),
        ("tap,tcp=80", "tap has no 'tcp': it takes name, bridge, address, mac, mtu, queues, dhcp"),
        ("user,bridge=br0", "user has no 'bridge': it takes tcp, udp, host, mac, mtu"),
        ("tap,bridge", "bridge has no value: write bridge=VALUE"),
        ("tap,name=", "name has no value: write name=VALUE"),
        ("tap,name=a,name=b", "name is there twice: write it once"),
        ("tap,name=much-too-long-x0", "the interface name 'much-too-long-x0' has 16 bytes: use at"),
        ("tap,name=a/b", "'a/b' cannot be the name of an interface: use letters, digits, '-' and"),
        ("tap,name=t%d", "'t%d' cannot be the name of an interface"),
        ("tap,name=a\n", "'tap,name=a\\n' has characters that cannot be printed: write it in one"),
        ("tap,mtu=67", "mtu=67: use a number from 68 to 65520"),
        ("tap,mtu=1e3", "mtu=1e3: use a number from 68 to 65520"),
        ("tap,queues=0", "queues=0: use a number from 1 to 16"),
        ("tap,dhcp=yes", "dhcp=yes: write dhcp=on or dhcp=off"),
        ("tap,bridge=none,dhcp=on", "address and dhcp need a bridge: leave out bridge=none"),
        ("tap,address=10.0.0.1", "10.0.0.1 is no address of a network: write one such as"),
        ("tap,address=10.0.0.1/33", "10.0.0.1/33 is no address of a network"),
        ("tap,mac=01:00:5e:00:00:01", "01:00:5e:00:00:01 is the address of a group"),
        ("tap,mac=00:00:00:00:00:00", "00:00:00:00:00:00 is the address of nobody"),
        ("tap,mac=02:00:00:00:00", "'02:00:00:00:00' is no MAC address: write six octets"),
        ("user,tcp=80:x", "tcp=80:x is no pair of ports: write tcp=HOST-PORT:GUEST-PORT"),
        ("user,tcp=0:80", "tcp=0:80: there is no such port: use 1 to 65535"),
        ("user,udp=1:65536", "udp=1:65536: there is no such port: use 1 to 65535"),
        ("user,tcp=1.2.3:80:80", "1.2.3 is no IPv4 address: write tcp="),
        ("user,tcp=80:1,tcp=*:80:2", "tcp port 80 of the host leads to two places: write it once"),
    ],
)
def test_what_describes_no_network(text: str, message: str) -> None:
    with pytest.raises(NetworkSpecificationError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"--net: {message}")


@given(st.text(alphabet="tapuser,=:.*0123456789bridgetcpmac/-%\n é", max_size=60))
def test_any_text_is_a_network_or_refused_in_one_line(text: str) -> None:
    for start in ("", "tap,", "user,tcp=", "tap,mac="):
        try:
            parse(start + text)
        except PykvmError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert isinstance(error, NetworkSpecificationError)  # noqa: PT017


def test_mac_addresses_of_machines() -> None:
    made = {mac_address(name, index) for name in ("a", "b", "c") for index in range(50)}
    assert len(made) == 150
    for mac in made:
        assert int(mac[:2], 16) & 3 == 2  # one interface, locally administered
        assert parse_mac(mac) == mac
    assert mac_address("a") == mac_address("a", 0)
    assert mac_address("demo") == "d6:59:f2:7e:09:97"  # stays the same from version to version
    assert mac_address("a", 11) != mac_address("a1", 1)


@pytest.mark.parametrize("text", ["", "02:00:00:00:00:0g", "02000000000a", "02:00:00:00:00:00:00"])
def test_what_is_no_mac_address(text: str) -> None:
    with pytest.raises(MacAddressError, match="is no MAC address"):
        parse_mac(text)
