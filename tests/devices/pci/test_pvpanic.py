"""The pvpanic device."""

import pytest

from pykvm.devices.pci.pvpanic import Pvpanic

pytestmark = pytest.mark.unit


def test_a_guest_panics() -> None:
    panics: list[int] = []
    device = Pvpanic(lambda: panics.append(1))
    (bar,) = device.bars
    assert device.read_bar(bar, 0, 1) == b"\3"
    assert device.read_bar(bar, 0, 4) == b"\3\0\0\0"
    device.write_bar(bar, 0, b"\2")  # a crash kernel takes over
    device.write_bar(bar, 1, b"\1")
    assert not panics
    device.write_bar(bar, 0, b"\1")
    assert panics == [1]
