"""The switch as a shared object, without any guest: its memory and its clock."""

import threading

import pytest

from pykvm.switch import NativePort, SwitchConfig
from pykvm.switch.hosted import HostedSwitch
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.unit

CONFIG = SwitchConfig(ports=2, lane_slots=16, tx_slots=16)


def clocks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "switch clock"]


def test_time_passes_while_the_switch_is_open() -> None:
    with HostedSwitch(CONFIG, epoch=0.01) as hosted:
        start = hosted.switch.counters().epoch
        wait_for(lambda: hosted.switch.counters().epoch >= start + 3)
        assert len(clocks()) == 1
    assert clocks() == []


def test_time_stands_still_for_measurements() -> None:
    with HostedSwitch(CONFIG, epoch=None):
        assert clocks() == []


def test_frames_cross_the_memory_of_the_object() -> None:
    with HostedSwitch(CONFIG) as hosted:
        for port in (0, 1):
            hosted.switch.enable(port)
        frame = b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + bytes(48)
        assert NativePort(hosted.switch, 0).send([frame]) == 1
        assert NativePort(hosted.switch, 1).receive_all() == [frame]
        window = hosted.instance.window(1)
        start = CONFIG.lane_offset(0) + 8
        assert bytes(window[start : start + len(frame)]) == frame


def test_closing_twice_is_harmless() -> None:
    hosted = HostedSwitch(CONFIG)
    hosted.close()
    hosted.close()
    assert hosted.instance.memory.closed
