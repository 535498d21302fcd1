"""Undeliverable frames are counted by reason; bad calls change nothing."""

from __future__ import annotations

import pytest

from pykvm.switch import SwitchCallError, SwitchConfig
from pykvm.switch._native import ffi, lib
from pykvm.switch.native_port import NativePort
from tests.rigs.switch.native_rig import BROADCAST, Rig, frame, make_rig, tagged

pytestmark = pytest.mark.unit


def window_of(port: NativePort) -> object:
    return ffi.cast("struct switch_window *", port.switch.window(port.number))


def small_rig(ports: int = 2) -> Rig:
    rig = make_rig(SwitchConfig(ports=ports, lane_slots=4, tx_slots=16, frame_limit=1000))
    rig.teach()
    return rig


def test_too_short_and_too_long_frames() -> None:
    rig = small_rig()
    good = [frame(1, 0, size=14), frame(1, 0, size=1000)]
    sent = [good[0], bytes(13), b"", good[1], frame(1, 0, size=1001), bytes(2048)]
    before = rig.switch.counters().ports[0]
    assert rig.ports[0].send(sent) == 6
    assert rig.ports[1].receive_all() == good
    after = rig.switch.counters().ports[0]
    assert (after.too_short - before.too_short, after.too_long - before.too_long) == (2, 2)
    assert after.frames - before.frames == 6
    assert after.bytes - before.bytes == 1014
    assert rig.switch.counters().check() == []


@pytest.mark.parametrize("length", [0, 13, 1001, 2049, 1 << 16, (1 << 31) + 64, (1 << 32) - 1])
def test_lengths_that_no_frame_has(length: int) -> None:
    rig = small_rig()
    rig.ports[0].put(0, frame(1, 0), length)
    assert rig.ports[0].call(lib.SWITCH_OP_SEND, 0, 1) == 1
    assert rig.ports[1].receive_all() == []
    assert rig.switch.counters().ports[0].dropped == 1


@pytest.mark.parametrize("tpid", [0x8100, 0x88A8])
@pytest.mark.parametrize("tags", range(10))
def test_four_bytes_more_for_each_of_up_to_eight_tags(tpid: int, tags: int) -> None:
    rig = small_rig()
    allowed = 1000 + 4 * min(tags, 8)
    vlans = range(1, tags + 1)
    sent = [
        tagged(frame(1, 0, size=allowed + more - 4 * tags), *vlans, tpid=tpid) for more in (0, 1)
    ]
    assert [len(one) for one in sent] == [allowed, allowed + 1]
    assert rig.ports[0].send(sent * 3) == 6
    assert rig.ports[1].receive_all() == [sent[0]] * 3
    assert rig.switch.counters().ports[0].too_long == 3
    assert rig.switch.counters().check() == []


def test_tags_behind_another_type_do_not_count() -> None:
    rig = small_rig()
    sent = frame(1, 0, size=12) + b"\x08\x00" + b"\x81\x00\x00\x01" * 8
    rig.ports[0].send([sent.ljust(1000, b"\0"), sent.ljust(1004, b"\0")])
    assert [len(one) for one in rig.ports[1].receive_all()] == [1000]


def test_no_frame_is_longer_than_a_slot() -> None:
    rig = make_rig(SwitchConfig(lane_slots=4, tx_slots=16, frame_limit=2040))
    sent = tagged(frame(1, 0, size=2036), 1)
    rig.ports[0].send([sent, sent + b"x"])
    assert rig.ports[1].receive_all() == [sent]
    assert rig.switch.counters().ports[0].too_long == 1


def test_a_frame_that_ends_inside_its_tag() -> None:
    rig = small_rig()
    whole = tagged(frame(1, 0, size=14), 5)
    assert rig.ports[0].send([whole[:size] for size in (14, 15, 16, 17, 18)]) == 5
    assert rig.ports[1].receive_all() == [whole]
    assert rig.switch.counters().ports[0].too_short == 4
    # In the middle of a run, the frames before and after it are delivered.
    assert rig.ports[0].send([whole, whole[:17], whole]) == 3
    assert rig.ports[1].receive_all() == [whole, whole]
    assert rig.switch.counters().check() == []


@pytest.mark.parametrize("source", [BROADCAST, b"\x01\x00\x5e\x00\x00\x01", bytes(6)])
def test_sources_that_no_station_has(source: bytes) -> None:
    rig = small_rig(ports=3)
    assert rig.ports[0].send([frame(1, source), frame(BROADCAST, source)]) == 2
    assert rig.ports[1].receive_all() == rig.ports[2].receive_all() == []
    counters = rig.switch.counters()
    assert (counters.ports[0].bad_source, counters.ports[0].dropped) == (2, 2)
    assert counters.check() == []


def test_a_full_lane_drops_what_does_not_fit() -> None:
    rig = small_rig(ports=3)
    sent = [frame(1, 0, mark=mark) for mark in range(10)]
    assert rig.ports[0].send(sent) == 10
    assert rig.ports[1].receive(0, limit=2) == sent[:2]
    rig.ports[0].send([frame(1, 0, mark=mark) for mark in (20, 21, 22)])
    marks = [received[14] for received in rig.ports[1].receive(0)]
    assert marks == [2, 3, 20, 21]
    lane = rig.switch.counters().lanes[0][1]
    assert (lane.delivered, lane.full) == (6 + 1, 6 + 1)  # and one while the rig was taught
    assert rig.switch.counters().check() == []


def test_another_sender_has_a_lane_of_its_own() -> None:
    rig = small_rig(ports=3)
    rig.ports[0].send([frame(1, 0, mark=mark) for mark in range(10)])
    fresh = frame(1, 2, mark=99)
    rig.ports[2].send([fresh])
    assert rig.ports[1].receive(2) == [fresh]


def test_wait_stops_before_the_first_frame_that_does_not_fit() -> None:
    rig = small_rig()
    sent = [frame(1, 0, mark=mark) for mark in range(10)]
    assert rig.ports[0].send(sent, wait=True) == 4
    assert rig.ports[0].send(sent[4:], wait=True) == 0
    got = rig.ports[1].receive(0, limit=3)
    assert rig.ports[0].send(sent[4:], wait=True) == 3
    got += rig.ports[1].receive(0)
    assert rig.ports[0].send(sent[7:], wait=True) == 3
    got += rig.ports[1].receive(0)
    assert got == sent
    counters = rig.switch.counters()
    assert counters.ports[0].waited == 3
    assert counters.lanes[0][1].dropped == 0
    assert counters.check() == []


def test_wait_holds_a_flood_back_only_for_a_single_receiver() -> None:
    alone, three = small_rig(), small_rig(ports=3)
    sent = [frame(BROADCAST, 0, mark=mark) for mark in range(6)]
    assert alone.ports[0].send(sent, wait=True) == 4
    assert three.ports[0].send(sent, wait=True) == 6
    assert three.switch.counters().ports[0].copies == 12 + 2
    assert three.switch.counters().lanes[0][2].full == 2
    assert three.switch.counters().check() == alone.switch.counters().check() == []


@pytest.mark.parametrize("tail", [2, 5, 100, 1 << 31, (1 << 32) - 4])
@pytest.mark.parametrize("wait", [False, True])
def test_a_tail_that_is_no_position_of_the_lane(tail: int, wait: bool) -> None:
    rig = small_rig()  # one frame went through the lane: only tail 1 means empty
    window_of(rig.ports[1]).lane[0].tail = tail  # type: ignore[attr-defined]
    assert rig.ports[0].send([frame(1, 0)] * 3, wait=wait) == 3, "nobody waits for nonsense"
    lane = rig.switch.counters().lanes[0][1]
    assert (lane.delivered, lane.full, lane.bad_tail) == (1, 0, 3)
    assert rig.switch.counters().check() == []
    window_of(rig.ports[1]).lane[0].tail = 1  # type: ignore[attr-defined]
    assert rig.ports[0].send([frame(1, 0)]) == 1
    assert rig.switch.counters().lanes[0][1].delivered == 2, "and it recovers"


def test_a_forged_head_is_never_read_back() -> None:
    rig = small_rig()
    window_of(rig.ports[1]).lane[0].head = 77  # type: ignore[attr-defined]
    sent = frame(1, 0, mark=5)
    rig.ports[0].send([sent])
    assert rig.ports[1].receive(0) == [sent]


def test_positions_wrap_at_two_to_the_32() -> None:
    rig = small_rig()
    near_the_end = (1 << 32) - 2
    shared = ffi.cast("struct switch_shared *", rig.switch.address)
    shared.lane[0][1].start = shared.lane[0][1].delivered - near_the_end & (1 << 64) - 1
    window_of(rig.ports[1]).lane[0].head = near_the_end  # type: ignore[attr-defined]
    window_of(rig.ports[1]).lane[0].tail = near_the_end  # type: ignore[attr-defined]
    for start in range(0, 12, 4):
        sent = [frame(1, 0, mark=start + mark) for mark in range(4)]
        assert rig.ports[0].send(sent, wait=True) == 4
        assert rig.ports[1].receive(0) == sent
    assert rig.switch.counters().lanes[0][1].bad_tail == 0


def test_a_transmit_position_beyond_the_ring_wraps() -> None:
    rig = small_rig()
    sent = [frame(1, 0, mark=mark) for mark in range(4)]
    for index, one in enumerate(sent):
        rig.ports[0].put((14 + index) % 16, one)
    assert rig.ports[0].call(lib.SWITCH_OP_SEND, 0xFFFF_FFFF_FFFF_FFFE, 4) == 4
    assert rig.ports[1].receive(0) == sent


def test_a_guest_that_names_a_foreign_port() -> None:
    rig = small_rig(ports=3)
    rig.ports[0].put(0, frame(1, 0))
    for named in (1, 2, 3, 255):
        with pytest.raises(SwitchCallError, match="not the caller's") as refusal:
            rig.ports[0].call(lib.SWITCH_OP_SEND | named << 8, 0, 1)
        assert refusal.value.errno == lib.ELISA_EPERM
    assert rig.switch.counters().ports[0].foreign_port == 4
    assert rig.ports[1].receive_all() == []


@pytest.mark.attack("T24")
@pytest.mark.parametrize(
    ("a0", "a2"),
    [
        (0, 1),
        (2, 1),
        (0xFF, 1),
        (1 << 17 | 1, 1),
        (1 << 63 | 1, 1),
        (1, 17),
        (1, 257),
        (1, 1 << 32),
        (1, (1 << 64) - 1),
    ],
)
def test_unknown_operations_flags_and_counts(a0: int, a2: int) -> None:
    rig = small_rig()
    rig.ports[0].put(0, frame(1, 0))
    with pytest.raises(SwitchCallError) as refusal:
        rig.ports[0].call(a0, 0, a2)
    assert refusal.value.errno == lib.ELISA_EINVAL
    assert rig.switch.counters().ports[0].bad_request == 1
    assert rig.ports[1].receive_all() == []


def test_an_empty_burst_is_fine() -> None:
    rig = small_rig()
    assert rig.ports[0].send([]) == 0


def test_nobody_there() -> None:
    rig = make_rig(enabled=False)
    rig.switch.enable(0)
    assert rig.ports[0].send([frame(1, 0), frame(BROADCAST, 0)]) == 2
    assert rig.switch.counters().ports[0].no_receiver == 2
    assert rig.switch.counters().check() == []


def test_a_port_that_is_not_enabled_cannot_send() -> None:
    rig = small_rig()
    rig.switch.disable(0)
    with pytest.raises(SwitchCallError, match="not enabled") as refusal:
        rig.ports[0].send([frame(1, 0)])
    assert refusal.value.errno == lib.ELISA_ENETDOWN
    assert rig.switch.counters().ports[0].port_down == 1
    assert rig.ports[1].receive_all() == []
