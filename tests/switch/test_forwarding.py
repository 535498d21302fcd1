"""Destinations of frames: learning, ageing, flooding, filtering, pinning; frames arrive whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.resources import CAPTURE
from pykvm.switch import SwitchConfig, read_capture, split_capture
from pykvm.switch.geometry import MAX_PORTS
from tests.rigs.switch.native_rig import BROADCAST, Rig, frame, mac, make_rig, tagged

pytestmark = pytest.mark.unit

MULTICAST = b"\x01\x00\x5e\x00\x00\xfb"
LLDP = b"\x01\x80\xc2\x00\x00\x0e"


def three_ports() -> Rig:
    return make_rig(SwitchConfig(ports=3, lane_slots=32, tx_slots=32, max_age=3))


def test_an_unknown_destination_is_flooded_and_a_learned_one_is_not() -> None:
    rig = three_ports()
    first, answer = frame(1, 0, mark=1), frame(0, 1, mark=2)
    assert rig.ports[0].send([first]) == 1
    assert [port.receive_all() for port in rig.ports] == [[], [first], [first]]
    assert rig.ports[1].send([answer]) == 1
    assert [port.receive_all() for port in rig.ports] == [[answer], [], []]
    counters = rig.switch.counters()
    assert (counters.ports[0].unknown, counters.ports[0].copies) == (1, 2)
    assert (counters.ports[1].unicast, counters.ports[1].copies) == (1, 1)
    assert counters.check() == []


@pytest.mark.parametrize(
    ("destination", "kind"), [(BROADCAST, "broadcast"), (MULTICAST, "multicast")]
)
def test_group_addresses_reach_everybody_else(destination: bytes, kind: str) -> None:
    rig = three_ports()
    rig.teach()
    sent = frame(destination, 0, size=200)
    rig.ports[0].send([sent])
    assert [port.receive_all() for port in rig.ports] == [[], [sent], [sent]]
    assert getattr(rig.switch.counters().ports[0], kind) == 1


def test_a_station_that_moves_is_found_at_its_new_port() -> None:
    rig = three_ports()
    rig.teach()
    rig.ports[2].send([frame(0, 1)])  # station 1 is at port 2 now
    rig.ports[0].receive_all()
    rig.ports[0].send([frame(1, 0)])
    assert [len(port.receive_all()) for port in rig.ports] == [0, 0, 1]


def test_frames_to_a_station_on_the_same_port_are_filtered() -> None:
    rig = three_ports()
    rig.ports[0].send([frame(BROADCAST, 7), frame(7, 8)])
    assert [len(port.receive_all()) for port in rig.ports] == [0, 1, 1]
    assert rig.switch.counters().ports[0].same_port == 1
    assert rig.switch.counters().check() == []


def test_silent_stations_are_forgotten_and_talking_ones_are_not() -> None:
    rig = three_ports()
    rig.teach()
    for _ in range(3):  # max_age
        rig.switch.tick()
        rig.ports[1].send([frame(0, 1)])
    rig.ports[0].receive_all()
    rig.ports[1].send([frame(2, 1)])
    assert len(rig.ports[2].receive(1)) == 1, "three epochs are not too old"
    rig.switch.tick()
    rig.ports[0].send([frame(2, 0), frame(1, 0)])
    assert len(rig.ports[1].receive(0)) == 2, "station 2 is unknown, station 1 is not"
    assert len(rig.ports[2].receive(0)) == 1
    counters = rig.switch.counters().ports[0]
    assert (counters.unicast, counters.unknown) == (1, 2)  # one of them taught the rig


def test_an_entry_does_not_come_back_when_its_epoch_comes_round() -> None:
    rig = three_ports()
    rig.teach()
    for _ in range(256):
        rig.switch.tick()
    rig.ports[0].send([frame(1, 0)])
    assert len(rig.ports[2].receive(0)) == 1, "flooded"


def test_a_pinned_address_does_not_age_move_or_let_others_use_it() -> None:
    rig = three_ports()
    rig.teach()
    rig.switch.pin("02:00:00:00:00:01", 1)
    for _ in range(300):
        rig.switch.tick()
    rig.ports[2].send([frame(0, 1)])  # port 2 claims station 1
    assert rig.ports[0].receive_all() == []
    rig.ports[0].send([frame(1, 0)])
    assert [len(port.receive_all()) for port in rig.ports] == [0, 1, 0]
    rig.ports[1].send([frame(0, 1)])  # its owner may use it
    assert len(rig.ports[0].receive(1)) == 1
    assert rig.switch.counters().ports[2].spoofed == 1
    assert rig.switch.counters().check() == []
    rig.switch.unpin("02:00:00:00:00:01")
    rig.ports[2].send([frame(0, 1)])
    assert len(rig.ports[0].receive(2)) == 1


def test_one_port_cannot_crowd_the_others_out_of_the_table() -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=256, tx_slots=256))
    rig.teach()
    for start in range(0, 1 << 15, 256):  # eight times as many addresses as the table has room for
        rig.ports[2].send([frame(0, 0x10000 + start + n) for n in range(256)])
        rig.ports[0].receive_all()
    rig.ports[0].send([frame(1, 0)])
    assert [len(port.receive_all()) for port in rig.ports] == [0, 1, 0]
    assert rig.switch.counters().ports[0].unicast == 1


def test_sixty_four_ports() -> None:
    rig = make_rig(SwitchConfig(ports=MAX_PORTS, lane_slots=2, tx_slots=2))
    rig.teach()
    sent = frame(BROADCAST, 63)
    rig.ports[63].send([sent])
    for port in rig.ports[:63]:
        assert port.receive_all() == [sent]
    for number, port in enumerate(rig.ports):
        port.send([frame((number + 1) % MAX_PORTS, number, mark=number)])
    for number, port in enumerate(rig.ports):
        source = (number - 1) % MAX_PORTS
        assert port.receive_all() == [frame(number, source, mark=source)]
    counters = rig.switch.counters()
    assert counters.check() == []
    assert sum(port.unicast for port in counters.ports) == MAX_PORTS
    assert counters.ports[63].copies == 63 + 63 + 1  # learning, broadcast, unicast


@pytest.mark.parametrize("burst", [1, 7, 32, 256])
@pytest.mark.parametrize("lane_slots", [64, 256])
def test_the_capture_arrives_byte_for_byte_and_in_order(burst: int, lane_slots: int) -> None:
    rig = make_rig(SwitchConfig(lane_slots=lane_slots))
    sides = [[f.data for f in side] for side in split_capture(read_capture(CAPTURE)).sent]
    got: list[list[bytes]] = [[], []]
    left = [list(side) for side in sides]
    while any(left):
        for number, port in enumerate(rig.ports):
            del left[number][: port.send(left[number][:burst], wait=True)]
        for number, port in enumerate(rig.ports):
            got[number] += port.receive(1 - number)
    assert got[1] == sides[0]
    assert got[0] == sides[1]
    counters = rig.switch.counters()
    assert counters.check() == []
    for number in (0, 1):
        lane = counters.lanes[number][1 - number]
        assert (lane.delivered, lane.dropped) == (len(sides[number]), 0)
        assert lane.bytes == sum(map(len, sides[number])) == counters.ports[number].bytes
    assert counters.ports[0].broadcast == 1  # the client's ARP request


@settings(max_examples=60)
@given(st.data())
def test_every_size_arrives_unchanged_and_nothing_behind_it(data: st.DataObject) -> None:
    rig = make_rig(SwitchConfig(lane_slots=32, tx_slots=32, frame_limit=2040))
    sizes = data.draw(st.lists(st.integers(14, 2040), min_size=1, max_size=32))
    window = rig.switch.window(1)
    offset = rig.switch.config.lane_offset(0)
    for slot in range(32):
        rig.ports[0].put(slot, b"\xaa" * 2048)  # stale bytes that must stay with the sender
    sent = [frame(1, 0, size=size, mark=mark) for mark, size in enumerate(sizes)]
    assert rig.ports[0].send(sent) == len(sent)
    assert rig.ports[1].receive(0) == sent
    for slot, size in enumerate(sizes):
        start = offset + slot * 2048 + 8
        assert bytes(window[start + size : offset + (slot + 1) * 2048]) == bytes(2040 - size)


STATIONS = st.integers(0, 7)
VLANS = st.sampled_from([(), (0,), (1,), (2,), (1, 2), (0xFFF,)])


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(
                st.tuples(
                    st.one_of(
                        STATIONS.map(mac),
                        st.sampled_from([BROADCAST, MULTICAST, LLDP, mac(0xFFFF)]),
                    ),
                    st.one_of(STATIONS.map(mac), st.sampled_from([MULTICAST, bytes(6)])),
                    st.integers(12, 300),
                    VLANS,
                ),
                max_size=12,
            ),
        ),
        max_size=12,
    )
)
def test_it_does_what_a_switch_made_of_a_dictionary_does(
    bursts: list[tuple[int, list[tuple[bytes, bytes, int, tuple[int, ...]]]]],
) -> None:
    ports = range(4)
    rig = make_rig(SwitchConfig(ports=4, lane_slots=256, tx_slots=16, frame_limit=200))
    where: dict[tuple[int, bytes], int] = {}
    lanes: dict[tuple[int, int], list[bytes]] = {(s, d): [] for s in ports for d in ports}
    dropped = filtered = 0
    for sender, burst in bursts:
        sent = [
            tagged(frame(to, source, size, mark), *vlans)
            for mark, (to, source, size, vlans) in enumerate(burst)
        ]
        assert rig.ports[sender].send(sent) == len(sent)
        for one, (to, source, size, vlans) in zip(sent, burst, strict=True):
            vlan = vlans[0] if vlans else 0
            shortest = 18 if vlans else 14
            if len(one) < shortest or size > 200 or source in (MULTICAST, bytes(6)):
                dropped += 1
                continue
            where[vlan, source] = sender
            port = where.get((vlan, to))
            if port == sender or to == LLDP:
                filtered += 1
                continue
            for receiver in ports if port is None else [port]:
                if receiver != sender:
                    lanes[sender, receiver].append(one)
    for (sender, receiver), expected in lanes.items():
        assert rig.ports[receiver].receive(sender) == expected
    counters = rig.switch.counters()
    assert counters.check() == []
    assert sum(port.dropped for port in counters.ports) == dropped
    assert sum(port.filtered for port in counters.ports) == filtered
