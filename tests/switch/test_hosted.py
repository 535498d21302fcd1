"""The switch as a shared object, without any guest: its memory and its clock."""

import threading
import time

import pytest

from pykvm.switch import NativePort, SwitchConfig
from pykvm.switch.hosted import HostedSwitch

pytestmark = pytest.mark.unit

CONFIG = SwitchConfig(ports=2, lane_slots=16, tx_slots=16)


def epoch_after(hosted: HostedSwitch, wanted: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while hosted.switch.counters().epoch < wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    return hosted.switch.counters().epoch


def test_time_passes_while_the_switch_is_open() -> None:
    with HostedSwitch(CONFIG, epoch=0.01) as hosted:
        start = hosted.switch.counters().epoch
        assert epoch_after(hosted, start + 3, 20) >= start + 3
    assert "switch clock" not in {thread.name for thread in threading.enumerate()}


def test_time_stands_still_for_measurements() -> None:
    with HostedSwitch(CONFIG, epoch=None) as hosted:
        start = hosted.switch.counters().epoch
        time.sleep(0.05)
        assert hosted.switch.counters().epoch == start


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
