"""pykvm.network.tap and bridge: interfaces come, carry frames, and go."""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.closeable import ForkedProcessError
from pykvm.network import links, tap
from pykvm.network._tun import lib
from pykvm.network.bridge import BridgeAddressError, BridgePort, NotABridgeError
from pykvm.network.links import (
    InterfaceNameError,
    NetworkBusyError,
    NetworkError,
    NetworkPrivilegeError,
)
from pykvm.network.tap import Offload, Tap, TapExistsError, TunMissingError
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _tun(namespace: NetworkNamespace) -> None:
    need_tun()


def _ip(command: str) -> str:
    return subprocess.run(
        ["ip", *command.split()], check=True, capture_output=True, text=True
    ).stdout


def test_a_tap_in_a_bridge_of_ours(namespace: NetworkNamespace) -> None:
    with Tap() as made:
        there = namespace.interfaces()
        assert made.name == "pykvm-tap0"
        assert there["pykvm-tap0"].master == there["pykvm0"].index
        assert there["pykvm-tap0"].up
        assert there["pykvm0"].alias == "pykvm"
        assert made.port is not None
        assert (made.port.ours, made.port.address) == (True, "10.187.0.1/24")
        assert "10.187.0.1/24" in _ip("-4 addr show dev pykvm0")
        with Tap() as other, Tap(bridge="pykvm0") as third:
            assert len({made.name, other.name, third.name}) == 3
        assert "pykvm0" in namespace.interfaces()
        made.close()
        made.close()
        assert set(namespace.interfaces()) == {"lo"}


def test_a_bridge_goes_with_its_last_port_whoever_made_it(namespace: NetworkNamespace) -> None:
    first = Tap()
    second = Tap()
    mac = _ip("-o link show dev pykvm0").split("link/ether ")[1][:17]
    first.close()
    assert _ip("-o link show dev pykvm0").split("link/ether ")[1][:17] == mac
    assert "pykvm0" in namespace.interfaces()
    second.close()
    assert "pykvm0" not in namespace.interfaces()


KILLED = """
    import os, shutil, signal
    if {alone}:
        shutil.which = lambda name: None  # nobody to remove the bridge
    from pykvm.network.tap import Tap
    made = Tap("killed")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("alone", [False, True])
def test_a_killed_process(namespace: NetworkNamespace, alone: bool) -> None:
    """Its bridge is removed, or used by the next one."""
    script = textwrap.dedent(KILLED.format(alone=alone))
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    if alone:
        assert set(namespace.interfaces()) == {"lo", "pykvm0"}
        Tap("killed").close()
    wait_for(lambda: set(namespace.interfaces()) == {"lo"}, 10)


def test_a_killed_process_takes_nothing_from_others(namespace: NetworkNamespace) -> None:
    with Tap() as other:
        script = textwrap.dedent(KILLED.format(alone=False))
        subprocess.run([sys.executable, "-c", script], check=False)
        wait_for(lambda: not _removers(), 10)
        there = namespace.interfaces()
        assert there[other.name].master == there["pykvm0"].index


def _removers() -> int:
    """Number of processes that wait for the end of a killed one."""
    found = 0
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += b"\0killed\0pykvm\0" in process.read_bytes()
        except OSError:
            continue
    return found


def test_frames_pass(namespace: NetworkNamespace) -> None:
    """From one TAP's wire to another's, through the bridge, each with its header in front."""
    frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + b"hello".ljust(46, b".")
    with Tap() as one, Tap() as other:
        deadline = time.monotonic() + 5
        received = b""
        while not received.endswith(frame) and time.monotonic() < deadline:
            os.write(one.descriptors[0], bytes(12) + frame)
            try:
                received = os.read(other.descriptors[0], 70000)
            except BlockingIOError:
                time.sleep(0.01)
        assert (
            received == struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 0)[:10] + received[10:12] + frame
        )


def test_a_users_bridge_stays_as_it_is(namespace: NetworkNamespace) -> None:
    _ip("link add br7 mtu 9000 type bridge")
    _ip("addr add 10.1.0.1/24 dev br7")
    with Tap("t7", bridge="br7") as made:
        assert made.mtu == 9000
        assert made.port is not None
        assert (made.port.ours, made.port.address) == (False, "10.1.0.1/24")
        assert namespace.interfaces()["br7"].mtu == 9000
    assert set(namespace.interfaces()) == {"lo", "br7"}
    with pytest.raises(BridgeAddressError, match=r"^bridge br7 exists and has 10.1.0.1/24, not"):
        Tap("t7", bridge="br7", address="10.2.0.1/24")
    assert set(namespace.interfaces()) == {"lo", "br7"}
    _ip("link del br7")


def test_no_bridge(namespace: NetworkNamespace) -> None:
    with Tap("alone", bridge="none", mtu=1280) as made:
        there = namespace.interfaces()
        assert made.port is None
        assert set(there) == {"lo", "alone"}
        assert (there["alone"].mtu, there["alone"].up) == (1280, True)


def test_queues_and_offloads(namespace: NetworkNamespace) -> None:
    with Tap("many", queues=3, bridge="none") as made:
        assert len(set(made.descriptors)) == 3
        for descriptor in made.descriptors:
            size = fcntl.ioctl(descriptor, lib.TUNGETVNETHDRSZ, bytes(4))
            assert int.from_bytes(size, "little") == 12
            assert os.get_blocking(descriptor) is False
            assert os.get_inheritable(descriptor) is False
        assert made.offloads & Offload.CSUM
        made.set_offloads(made.offloads)
        with pytest.raises(NetworkError, match=r"^cannot set the offloads of many: invalid arg"):
            made.set_offloads(Offload(1 << 30))


def test_names_that_are_taken(namespace: NetworkNamespace) -> None:
    with Tap("mine", bridge="none"):
        with pytest.raises(
            TapExistsError, match=r"^mine exists: it is another process's TAP: choos"
        ):
            Tap("mine")
        with pytest.raises(TapExistsError, match=r"^mine exists: it is another process's TAP"):
            Tap("mine", queues=2)
    with pytest.raises(TapExistsError, match=r"^lo exists and is no TAP: choose another name$"):
        Tap("lo")
    _ip("tuntap add dev tun1 mode tun")
    with pytest.raises(TapExistsError, match=r"^tun1 exists and is no TAP"):
        Tap("tun1")
    _ip("link del tun1")
    _ip("tuntap add dev theirs mode tap user 12345")
    with pytest.raises(TapExistsError, match=r"^theirs exists and is not this user's TAP: choose"):
        Tap("theirs")
    _ip("link del theirs")


@pytest.mark.parametrize("multiple", ["", " multi_queue"])
def test_a_persistent_tap_of_this_user(namespace: NetworkNamespace, multiple: str) -> None:
    _ip(f"tuntap add dev kept mode tap user {os.geteuid()}{multiple}")
    with Tap("kept") as made:
        assert made.port is None
        with pytest.raises((TapExistsError, NetworkError), match=r"in use|busy"):
            Tap("kept")
    if not multiple:
        with pytest.raises(TapExistsError, match=r"^kept exists and has one queue: ask for one"):
            Tap("kept", queues=2)
    with Tap("kept", bridge="pykvm0") as made:
        assert made.port is not None
    there = namespace.interfaces()
    assert set(there) == {"lo", "kept"}
    assert there["kept"].master == 0
    _ip("link del kept")


def test_bridges_that_are_none(namespace: NetworkNamespace) -> None:
    with pytest.raises(NotABridgeError, match=r"^lo exists and is no bridge: name a bridge, or"):
        Tap("t0", bridge="lo")
    with pytest.raises(InterfaceNameError, match=r"has 16 bytes: use at most 15$"):
        Tap("t0", bridge="a" * 16)
    with pytest.raises(InterfaceNameError, match=r"^'' cannot be the name of an interface"):
        Tap("")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.0.0.1", "'10.0.0.1' is no IPv4 address of a network: write one such as 10.187.0.1/24"),
        ("10.0.0.1/31", "'10.0.0.1/31' is no IPv4 address of a network"),
        ("fd00::1/64", "'fd00::1/64' is no IPv4 address of a network"),
        ("10.0.0.0/24", "10.0.0.0/24 is the network itself, or its broadcast: use an address in"),
        ("127.0.0.1/24", "127.0.0.0/24 overlaps 127.0.0.0/8 on lo: choose another address"),
    ],
)
def test_addresses_of_bridges(namespace: NetworkNamespace, address: str, message: str) -> None:
    with pytest.raises(BridgeAddressError) as caught:
        Tap("t0", bridge="new", address=address)
    assert str(caught.value).startswith(message)


def test_what_the_kernel_refuses_is_undone(namespace: NetworkNamespace) -> None:
    with pytest.raises(NetworkError, match=r"^cannot join bridge new: invalid argument$") as caught:
        Tap("t0", bridge="new", mtu=70000)
    assert caught.value.errno == 22
    assert set(namespace.interfaces()) == {"lo"}


@pytest.fixture
def nobody() -> Iterator[None]:
    os.seteuid(65534)  # drops the effective capabilities, and seteuid(0) brings them back
    yield
    os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="this host does not allow a change of user")
def test_without_privileges(namespace: NetworkNamespace, nobody: None) -> None:
    """/dev/net/tun is open to all on Debian; here it may be root's alone."""
    with pytest.raises(
        NetworkPrivilegeError, match=r"^cannot (make a TAP|open /dev/net/tun): .*user$"
    ):
        Tap()
    with pytest.raises(NetworkPrivilegeError, match=r"^cannot join bridge new: operation not perm"):
        BridgePort(1, "new")


@pytest.mark.skipif(os.geteuid() != 0, reason="this host does not allow a change of user")
def test_privileges_given_up_meanwhile(namespace: NetworkNamespace) -> None:
    """Another process removes the bridge."""
    made = Tap()
    os.seteuid(65534)
    try:
        made.close()
    finally:
        os.seteuid(0)
    assert set(namespace.interfaces()) == {"lo"}


def test_no_driver(namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "_DEVICE", "/dev/net/no-such-device")
    with pytest.raises(
        TunMissingError, match=r"^no /dev/net/no-such-device here: type `.*modprobe"
    ):
        Tap()


def test_another_process_holds_the_lock(
    namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_LOCK_SECONDS", 0.1)
    with links.namespace_lock():
        with pytest.raises(NetworkBusyError, match=r"^another process changes bridges for"):
            Tap()
        other = NetworkNamespace()
        with other.entered(), Tap():
            pass
        other.close()
    Tap().close()


def test_many_at_once(namespace: NetworkNamespace) -> None:
    """Processes that come and go share a bridge; none loses its port, and nothing stays."""
    script = """
        from pykvm.network.tap import Tap
        from pykvm.network.links import links, netlink
        for _ in range(8):
            with Tap() as made, netlink("look") as route:
                there = {one.index: one for one in links(route)}
                assert there[made.index].master == made.port.index, there
                assert there[made.port.index].name == "pykvm0"
    """
    started = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) for _ in range(4)]
    assert [one.wait(120) for one in started] == [0] * 4
    assert set(namespace.interfaces()) == {"lo"}


def test_in_a_forked_process(namespace: NetworkNamespace) -> None:
    with Tap() as made:
        child = os.fork()
        if child == 0:
            try:
                made.set_offloads(Offload(0))
            except ForkedProcessError:
                made.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        there = namespace.interfaces()
        assert there[made.name].master == there["pykvm0"].index


def test_descriptors_do_not_leak(namespace: NetworkNamespace) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for arguments in ({"bridge": "lo"}, {"mtu": 70000}, {"name": "lo"}, {"queues": 300}):
        with pytest.raises((NotABridgeError, NetworkError, TapExistsError)):
            Tap(**arguments)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_address_is_the_hosts(namespace: NetworkNamespace) -> None:
    """Something listens on the bridge's address, and nothing else of pykvm does."""
    with Tap(), socket.create_server(("10.187.0.1", 0)):
        listening = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        assert len(listening) == 1
