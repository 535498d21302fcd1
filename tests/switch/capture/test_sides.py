"""Captures split between two guests: the real switch carries every frame across."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pykvm.switch import SwitchConfig
from pykvm.switch.capture import (
    Capture,
    CaptureError,
    EmptyCaptureError,
    Frame,
    OddRingError,
    Sides,
    split_capture,
)
from tests.rigs.switch.capture_files import A, B, C
from tests.rigs.switch.native_rig import BROADCAST, frame, mac, make_rig, tagged

pytestmark = pytest.mark.unit

D, E = mac(4), mac(5)
LLDP = b"\x01\x80\xc2\x00\x00\x0e"


def capture(*pairs: tuple[bytes, bytes], vlan: int | None = None) -> Capture:
    """Return a capture of one frame for each pair, from the first to the second address."""
    sent = [
        Frame(0, data if vlan is None else tagged(data, vlan), number)
        for number, (source, to) in enumerate(pairs, 1)
        for data in [frame(to, source, mark=number)]
    ]
    return Capture(sent, "x.pcap", "x.pcap")


def sources(sides: Sides) -> list[set[bytes]]:
    return [{one.source for one in side} for side in sides.sent]


def test_a_server_and_its_clients() -> None:
    """A capture by tcpdump on a server, with either side sending first."""
    talk = [(A, B), (B, A), (A, C), (C, A), (D, BROADCAST), (A, D)]
    for turn in range(6):
        sides = split_capture(capture(*talk[turn:], *talk[:turn]))
        assert sorted(sources(sides), key=len) == [{A}, {B, C, D}]
        assert talk[turn][0] in sources(sides)[0], "the first frame's is guest 0"


def test_two_conversations_that_have_nothing_to_do_with_each_other() -> None:
    sides = split_capture(capture((A, B), (B, A), (C, D), (D, C)))
    assert sources(sides) == [{A, D}, {B, C}]


def test_groups_and_silent_stations_tie_nobody() -> None:
    sides = split_capture(capture((A, BROADCAST), (B, BROADCAST), (A, mac(99)), (B, mac(99))))
    assert sources(sides) == [{A}, {B}]


def test_frames_stay_in_order() -> None:
    sides = split_capture(capture((A, B), (C, A), (B, A), (C, A), (A, C)))
    assert [[one.number for one in side] for side in sides.sent] == [[1, 5], [2, 3, 4]]


@pytest.mark.parametrize(
    ("pairs", "number", "text", "station"),
    [
        ([(A, B), (B, A), (C, A), (B, C), (C, B)], 4, f"{B.hex(':')} to {C.hex(':')}", B),
        ([(A, B), (B, C), (C, D), (D, E), (E, A), (A, C)], 5, f"{E.hex(':')} to {A.hex(':')}", C),
    ],
)
def test_a_ring_of_three_or_five_is_refused(
    pairs: list[tuple[bytes, bytes]], number: int, text: str, station: bytes
) -> None:
    with pytest.raises(OddRingError) as refusal:
        split_capture(capture(*pairs))
    assert refusal.value.problem.startswith(f"x.pcap: frame {number} ({text}) closes a ring")
    command = f"`tcpdump -r x.pcap -w out.pcap ether host {station.hex(':')}`"
    assert command in refusal.value.next_step


def test_a_ring_of_four_is_not() -> None:
    sides = split_capture(capture((A, B), (B, C), (C, D), (D, A)))
    assert sources(sides) == [{A, C}, {B, D}]


def test_stations_on_two_vlans_are_two() -> None:
    """A router passes frames from one VLAN to the other: three pairs, and no ring."""
    there = capture((A, C), (C, A), (A, B), vlan=10).frames
    here = capture((B, C), (C, B), vlan=20).frames
    sides = split_capture(Capture(there + here))
    assert sorted(map(len, sides.sent)) == [2, 3]


def test_what_a_switch_forwards_to_nobody_is_left_out() -> None:
    group = b"\x01\x00\x5e\x00\x00\x01"
    sides = split_capture(
        capture((A, B), (B, A), (A, LLDP), (group, A), (bytes(6), A), (A, A), (B, A))
    )
    assert [[one.number for one in side] for side in sides.sent] == [[1], [2, 7]]
    left_out = {name: [one.number for one in frames] for name, frames in sides.left_out.items()}
    assert left_out == {"link_local": [3], "bad_source": [4, 5], "same_port": [6]}


def test_a_monologue_is_refused() -> None:
    with pytest.raises(EmptyCaptureError, match=r"x\.pcap holds frames of one station only"):
        split_capture(capture((A, B), (A, BROADCAST), (A, C)))
    with pytest.raises(EmptyCaptureError, match="no frames that a switch forwards"):
        split_capture(capture((A, LLDP), (B, LLDP)))


STATIONS = [mac(number) for number in range(1, 8)]
TALK = st.lists(
    st.tuples(
        st.sampled_from([*STATIONS, bytes(6), b"\x01\x00\x5e\x00\x00\x01"]),
        st.sampled_from([*STATIONS, BROADCAST, LLDP, mac(99)]),
        st.sampled_from([None, None, 0, 1, 2]),
    ),
    min_size=1,
    max_size=24,
)


def frames_of(talk: list[tuple[bytes, bytes, int | None]]) -> list[Frame]:
    return [
        Frame(0, data if vlan is None else tagged(data, vlan), number)
        for number, (source, to, vlan) in enumerate(talk, 1)
        for data in [frame(to, source, mark=number)]
    ]


@settings(max_examples=300)
@given(TALK, st.randoms(use_true_random=False))
def test_the_switch_carries_every_frame_across(talk, dice) -> None:  # type: ignore[no-untyped-def]
    """Every frame arrives in any order of the two guests' bursts, and again in a second round."""
    whole = Capture(frames_of(talk))
    try:
        sides = split_capture(whole)
    except CaptureError:
        assume(False)
    assert sum(map(len, (*sides.sent, *sides.left_out.values()))) == len(whole.frames)
    rig = make_rig(SwitchConfig(lane_slots=64, tx_slots=32))
    for _ in range(2):
        left = [[one.data for one in side] for side in sides.sent]
        while any(left):
            port = dice.choice([number for number in (0, 1) if left[number]])
            count = dice.randint(1, len(left[port]))
            burst, left[port] = left[port][:count], left[port][count:]
            assert rig.ports[port].send(burst) == count
            assert rig.ports[1 - port].receive(port) == burst
    for reason, frames in sides.left_out.items():
        before = getattr(rig.switch.counters().ports[0], reason)
        for one in frames:
            rig.ports[0].send([one.data])
            assert rig.ports[1].receive(0) == [] or reason == "same_port"
        assert getattr(rig.switch.counters().ports[0], reason) - before == len(frames)


@settings(max_examples=300)
@given(TALK, st.sampled_from([3, 5, 7]), st.randoms(use_true_random=False))
def test_what_the_refusal_of_a_ring_says_to_type_helps(talk, size, dice) -> None:  # type: ignore[no-untyped-def]
    """The tcpdump filter named in the error keeps what can be split."""
    ring = [(STATIONS[at], STATIONS[(at + 1) % size], None) for at in range(size)]
    frames = frames_of(dice.sample(talk + ring, len(talk) + size))
    with pytest.raises(OddRingError) as refusal:
        split_capture(Capture(frames))
    station = bytes.fromhex(refusal.value.next_step.rstrip("`").split()[-1].replace(":", ""))
    assert all(split_capture(Capture([one for one in frames if station in one.data[:12]])).sent)


@settings(max_examples=300)
@given(TALK)
def test_only_what_cannot_be_parted_is_refused(
    talk: list[tuple[bytes, bytes, int | None]],
) -> None:
    """The result agrees with a search of all ways to give seven stations a side."""
    frames = frames_of(talk)
    refused = False
    try:
        split_capture(Capture(frames))
    except OddRingError:
        refused = True
    except EmptyCaptureError:
        assume(False)
    carried = [
        one
        for one in frames
        if one.source in STATIONS and one.destination not in (LLDP, one.source)
    ]
    senders = sorted({(one.vlan, one.source) for one in carried})
    ties = {
        ((one.vlan, one.source), (one.vlan, one.destination))
        for one in carried
        if (one.vlan, one.destination) in senders
    }
    assume(len(senders) <= 10)
    possible = any(
        all(sides[one] != sides[other] for one, other in ties)
        for colours in itertools.product((0, 1), repeat=len(senders))
        for sides in [dict(zip(senders, colours, strict=True))]
    )
    assert refused == (not possible)
