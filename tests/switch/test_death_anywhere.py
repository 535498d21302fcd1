"""A vCPU killed at every single instruction of one call, and a receiver at every one of its own.

Each time the other ports go on at once, and delivered frames are whole and in order. The counters
add up after the host has given up the dead vCPU, and the port serves its next guest.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from functools import partial

import pytest

from pykvm.switch import SwitchConfig, _native
from pykvm.switch._native import ffi, lib
from tests.rigs.switch.native_rig import BROADCAST, Rig, frame, make_rig
from tests.rigs.switch.single_step import killed_after
from tests.rigs.switch.variants import AS_BUILT

pytestmark = pytest.mark.unit

SEND = lib.SWITCH_OP_SEND
TO_1 = [frame(1, 0, mark=mark) for mark in (1, 2)]
TO_ALL = frame(BROADCAST, 0, mark=3)
TO_2 = frame(2, 0, mark=4)
AFTER = frame(BROADCAST, 0, mark=50)

TAKE = ctypes.CDLL(str(_native.__file__)).switch_window_take
TAKE.argtypes = (
    [ctypes.c_void_p] * 2 + [ctypes.c_uint32] + [ctypes.c_void_p] * 2 + [ctypes.c_uint32]
)


def make() -> Rig:
    rig = make_rig(SwitchConfig(ports=4, lane_slots=4, tx_slots=8))
    rig.teach()
    return rig


def prepared() -> Rig:
    """Return a rig in which port 0 is about to send.

    It sends a run of two frames, a flood for which port 3's lane is full, a frame that is too
    short, and one frame for port 2.
    """
    rig = make()
    for mark in range(4):
        rig.ports[0].send([frame(3, 0, mark=90 + mark)])
    for slot, one in enumerate([*TO_1, TO_ALL, b"short", TO_2]):
        rig.ports[0].put(slot, one)
    return rig


def check_after_death(rig: Rig) -> tuple[int, int, int]:
    """Check the switch; return frames handled, copies lost, and whether the call was cut."""
    # No other port waits: their calls work before the host has noticed anything.
    other = frame(1, 2, mark=77)
    assert rig.ports[2].send([other]) == 1
    assert rig.ports[1].receive(2) == [other]
    got = [rig.ports[1].receive(0), rig.ports[2].receive(0)]

    before = rig.switch.counters().ports[0]
    rig.switch.disable(0, vcpu_gone=True)
    counters = rig.switch.counters()
    assert counters.check() == []
    own = counters.ports[0]
    for index, port in enumerate((1, 2)):
        got[index] += rig.ports[port].receive(0)
        taught = 1
        assert counters.lanes[0][port].delivered == len(got[index]) + taught
    to_1, to_2 = [*TO_1, TO_ALL], [TO_ALL, TO_2]
    assert got[0] == to_1[: len(got[0])], "whole, in order, a run as a whole"
    assert len(got[0]) != 1
    assert got[1] == to_2[: len(got[1])]
    # Four frames to port 3, and the very first one, went before. Floods ask for three copies.
    taught_and_filled = 1 + 4
    frames = own.frames - taught_and_filled
    assert 0 <= frames <= 5
    asked = own.copies - (3 + 4)
    dropped = counters.lanes[0][3].full
    assert asked == len(got[0]) + len(got[1]) + dropped + own.lost
    assert own.lost <= 2
    assert own.cut - before.cut in (0, 1)

    rig.switch.enable(0)
    rig.ports[0].send([AFTER])
    assert rig.ports[1].receive(0) == rig.ports[2].receive(0) == [AFTER]
    return frames, own.lost, own.cut


@pytest.mark.attack("T19")
def test_a_sender_killed_at_every_instruction() -> None:
    results = []
    for steps in itertools.count():
        rig = prepared()
        send = partial(AS_BUILT.serve, SEND, 0, 5, rig)
        ended = killed_after(steps, AS_BUILT.address, send)
        results.append(check_after_death(rig))
        if ended:
            break
    print(f"killed at each of {len(results) - 1} instructions")
    assert len(results) > 300
    frames = [result[0] for result in results]
    assert frames == sorted(frames), "a call never takes anything back"
    assert (frames[0], frames[-1]) == (0, 5)
    assert results[-1] == (5, 0, 0), "the call that was not killed"
    cut = [result[2] for result in results]
    assert sum(cut) > len(cut) - 60, "few instructions lie outside of the odd sequence"
    assert {result[1] for result in results} == {0, 1, 2}


def receive_natively(rig: Rig, port: int) -> Callable[[], object]:
    frames, lengths = ctypes.create_string_buffer(8 * 2048), (ctypes.c_uint32 * 8)()
    window = int(ffi.cast("uintptr_t", rig.switch.window(port)))
    return lambda: TAKE(rig.switch.address, window, 0, frames, lengths, 8)


@pytest.mark.attack("T19")
def test_a_receiver_killed_at_every_instruction() -> None:
    address = ctypes.cast(TAKE, ctypes.c_void_p).value or 0
    for steps in itertools.count():
        rig = make()
        sent = [frame(1, 0, size=60, mark=mark) for mark in range(2)]
        rig.ports[0].send(sent)
        ended = killed_after(steps, address, receive_natively(rig, 1))
        # Its sender goes on, into the remaining room and beyond.
        assert rig.ports[0].send([frame(1, 0, mark=9)] * 4) == 4
        rig.switch.disable(1, vcpu_gone=True)
        assert rig.ports[0].send([frame(1, 0, mark=9)]) == 1  # to a port that is gone
        rig.switch.enable(1)
        assert rig.ports[1].receive_all() == []
        rig.ports[0].send([AFTER])
        assert rig.ports[1].receive(0) == [AFTER]
        assert rig.switch.counters().check() == []
        if ended:
            break
    assert steps > 50
