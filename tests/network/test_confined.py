"""Networks of a monitor that has confined itself: frames pass, and everything is removed."""

import shutil

import pytest

from pykvm.devices.virtio.net import Net
from pykvm.devices.virtio.net_features import NetFeature
from pykvm.network.mac_address import mac_address
from pykvm.network.tap import Tap
from pykvm.network.user_network import UserNetwork
from pykvm.sandbox import Confinement, enter
from tests.rigs.confined import in_child
from tests.rigs.net_driver import TRANSMIT, NetDriver
from tests.rigs.network_namespace import NetworkNamespace, need_tun
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

MAC = mac_address("guest")
_ANSWER = bytes.fromhex("0806 0001 0800 0604 0002")  # RFC 826, from the type of the frame on


def _question(guest: str, host: str) -> bytes:
    """Ask for the MAC address of `host` (RFC 826)."""
    mac = bytes.fromhex(MAC.replace(":", ""))
    addresses = [bytes(map(int, one.split("."))) for one in (guest, host)]
    body = bytes.fromhex("0001080006040001") + mac + addresses[0] + bytes(6) + addresses[1]
    return (b"\xff" * 6 + mac + b"\x08\x06" + body).ljust(60, b"\0")


def _is_answered(device: Net, driver: NetDriver, question: bytes) -> bool:
    """Return whether the other side answers, before and after a reset."""
    for _ in range(2):
        driver.start(device)
        driver.offer()
        assert driver.send(question)
        answered = False
        while not answered:
            frames = driver.received(1, 5)
            if not frames:
                return False
            answered = any(frame[12:22] == _ANSWER for _, frame in frames)
        driver.completed(TRANSMIT, 1)
        driver.stop(device)
    return True


def test_a_tap(namespace: NetworkNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    need_tun()

    def body() -> bool:
        tap = Tap()
        enter(Confinement())
        with NetDriver(NetFeature.MRG_RXBUF) as driver, Net(driver.memory, tap, MAC) as device:
            return _is_answered(device, driver, _question("10.187.0.9", "10.187.0.1"))

    assert in_child(body)
    assert capfd.readouterr().err == ""
    wait_for(lambda: set(namespace.interfaces()) == {"lo"}, 10)


def test_passt(namespace: NetworkNamespace) -> None:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")

    def body() -> bool:
        network = UserNetwork(MAC)
        enter(Confinement())
        with NetDriver(NetFeature.MRG_RXBUF) as driver, Net(driver.memory, network, MAC) as device:
            answered = _is_answered(device, driver, _question("10.0.2.15", "10.0.2.2"))
        return answered and not network.complaint()

    assert in_child(body)
