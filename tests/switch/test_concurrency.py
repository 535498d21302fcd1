"""Ports used by several threads at once; cffi releases the GIL during each call."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pykvm.switch import SwitchConfig
from tests.rigs.switch.native_rig import BROADCAST, frame, mac, make_rig

pytestmark = pytest.mark.unit

PORTS = 4
BURSTS = 150
SIZES = (60, 64, 65, 200, 511, 512, 1000, 1514)


def sender(port: int) -> list[list[bytes]]:
    """Return the bursts that `port` sends; each frame's mark is its position in the order."""
    choice = random.Random(port)
    mark = 0
    bursts = []
    for _ in range(BURSTS):
        burst = []
        for _ in range(choice.choice((1, 5, 32))):
            others = [number for number in range(PORTS) if number != port]
            to = BROADCAST if choice.random() < 0.05 else mac(choice.choice(others))
            burst.append(frame(to, port, choice.choice(SIZES), mark))
            mark += 1
        bursts.append(burst)
    return bursts


@pytest.mark.parametrize("lane_slots", [16, 64])
def test_frames_stay_whole_ordered_and_accounted_for(lane_slots: int) -> None:
    rig = make_rig(SwitchConfig(ports=PORTS, lane_slots=lane_slots, tx_slots=32, max_age=50))
    rig.teach()
    traffic = [sender(port) for port in range(PORTS)]
    failures: list[BaseException] = []
    received: list[list[list[bytes]]] = [[[] for _ in range(PORTS)] for _ in range(PORTS)]
    start = threading.Barrier(PORTS + 1)
    sending = threading.Event()
    sending.set()

    def take(number: int) -> None:
        for source in range(PORTS):
            received[source][number] += rig.ports[number].receive(source)

    def guest(number: int) -> None:
        try:
            start.wait()
            for burst in traffic[number]:
                left = burst
                while left:
                    left = left[rig.ports[number].send(left, wait=True) :]
                    take(number)
            while sending.is_set():
                take(number)
            take(number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guest, args=(number,)) for number in range(PORTS)]
    for thread in threads:
        thread.start()
    start.wait()
    expected = sum(map(len, (burst for bursts in traffic for burst in bursts)))
    while sum(port.frames for port in rig.switch.counters().ports) < expected + PORTS:
        if failures:
            break
        rig.switch.tick()  # time passes and counters are read while frames flow
        time.sleep(0.04)  # but no station is silent for 50 epochs
    sending.clear()
    for thread in threads:
        thread.join()
    assert not failures

    counters = rig.switch.counters()
    assert counters.check() == []
    for source in range(PORTS):
        sent = [one for burst in traffic[source] for one in burst]
        position = {one: index for index, one in enumerate(sent)}
        for destination in range(PORTS):
            got = received[source][destination]
            places = [position[one] for one in got]  # KeyError: a frame that was never sent
            assert places == sorted(set(places)), "in order, none twice"
            lane = counters.lanes[source][destination]
            taught = 1 if source != destination else 0
            assert lane.delivered == len(got) + taught
            assert lane.bad_tail == 0
            unicast = [one for one in sent if one[:6] == mac(destination)]
            missing = set(unicast) - set(got)
            assert not missing, "unicast waited for room, so all of it arrived"
