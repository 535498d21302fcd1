"""Stations are learned for each VLAN and pinned on all of them.

Groups reserved for the link are not forwarded.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pykvm.switch import SwitchConfig
from pykvm.switch._native import ffi, lib
from tests.rigs.switch.native_rig import Rig, frame, mac, make_rig, tagged
from tests.rigs.switch.single_step import count_instructions
from tests.rigs.switch.variants import AS_BUILT

pytestmark = pytest.mark.unit

ROUTER = 7


def three_ports(group_forward_mask: int = 0) -> Rig:
    return make_rig(
        SwitchConfig(ports=3, lane_slots=32, tx_slots=32, group_forward_mask=group_forward_mask)
    )


def receivers(rig: Rig) -> list[int]:
    """Take the frames that wait for each port; return their numbers."""
    return [len(port.receive_all()) for port in rig.ports]


@pytest.mark.parametrize("tpid", [0x8100, 0x88A8])
def test_one_address_is_another_station_on_another_vlan(tpid: int) -> None:
    """A router on a stick or a pair of firewalls has one address at two ports."""
    rig = three_ports()
    rig.ports[1].send([tagged(frame(9, ROUTER), 10, tpid=tpid)])
    rig.ports[2].send([tagged(frame(9, ROUTER), 20, tpid=tpid)])
    receivers(rig)
    rig.ports[0].send([tagged(frame(ROUTER, 1), 10, tpid=tpid)])
    assert receivers(rig) == [0, 1, 0]
    rig.ports[0].send([tagged(frame(ROUTER, 1), 20, tpid=tpid)])
    assert receivers(rig) == [0, 0, 1]
    rig.ports[0].send([tagged(frame(ROUTER, 1), 30, tpid=tpid), frame(ROUTER, 1)])
    assert receivers(rig) == [0, 2, 2], "unknown there: flooded"
    counters = rig.switch.counters().ports[0]
    assert (counters.unicast, counters.unknown) == (2, 2)


def test_untagged_and_priority_tagged_frames_are_vlan_0() -> None:
    rig = three_ports()
    rig.teach()
    rig.ports[0].send([tagged(frame(1, 0), 0, priority=7)])
    assert receivers(rig) == [0, 1, 0]
    rig.ports[2].send([tagged(frame(0, ROUTER), 0, priority=5)])
    receivers(rig)
    rig.ports[0].send([frame(ROUTER, 0)])
    assert receivers(rig) == [0, 0, 1]


def test_the_outermost_tag_names_the_vlan() -> None:
    rig = three_ports()
    rig.ports[1].send([tagged(frame(9, ROUTER), 10, 99)])
    receivers(rig)
    rig.ports[0].send([tagged(frame(ROUTER, 1), 10), tagged(frame(ROUTER, 1), 99, 10)])
    assert receivers(rig) == [0, 2, 1]


def test_a_run_ends_where_the_vlan_changes_and_not_where_the_priority_does() -> None:
    rig = three_ports()
    rig.ports[1].send([tagged(frame(9, ROUTER), 10)])
    rig.ports[2].send([tagged(frame(9, ROUTER), 0x10A)])
    receivers(rig)
    sent = [
        tagged(frame(ROUTER, 1, mark=mark), vlan, priority=mark)
        for mark, vlan in enumerate((10, 10, 0x10A, 0x10A, 10))
    ]
    rig.ports[0].send(sent)
    assert rig.ports[1].receive(0) == [sent[0], sent[1], sent[4]]
    assert rig.ports[2].receive(0) == sent[2:4]

    def instructions(priorities: Sequence[int]) -> int:
        for slot, priority in enumerate(priorities):
            rig.ports[0].put(slot, tagged(frame(ROUTER, 1), 10, priority=priority))
        return count_instructions(
            AS_BUILT.address, lambda: AS_BUILT.serve(lib.SWITCH_OP_SEND, 0, 8, rig)
        )

    assert instructions(range(8)) == instructions([0] * 8)


def test_every_station_is_told_from_every_other() -> None:
    """The table stores 50 of a station's 59 bits; the index of its line implies the others."""
    rig = three_ports()
    shared = ffi.cast("struct switch_shared *", rig.switch.address)
    addresses = [int.from_bytes(mac(number), "little") for number in (1, 2)] + [0xFFFFFFFFFFFE]
    places = set()
    for address in addresses:
        for vlan in range(4096):
            station = lib.switch_station(shared, address, vlan)
            rest = lib.switch_station_rest(station)
            assert rest & (1 << 14) - 1 == 0, "these bits of an entry say other things"
            places.add((lib.switch_station_line(station), rest))
    assert len(places) == 3 * 4096
    assert {line for line, _ in places} == set(range(512))


def test_a_pinned_address_is_pinned_on_every_vlan() -> None:
    rig = three_ports()
    rig.teach()
    rig.switch.pin("02:00:00:00:00:01", 1)
    for vlans in ((), (0,), (5,), (0xFFF,), (5, 6)):
        rig.ports[2].send([tagged(frame(0, 1), *vlans)])  # port 2 claims station 1
        assert receivers(rig) == [0, 0, 0]
        rig.ports[0].send([tagged(frame(1, 0), *vlans)])
        assert receivers(rig) == [0, 1, 0]
        rig.ports[1].send([tagged(frame(0, 1), *vlans)])
        assert receivers(rig)[0] == 1
    assert rig.switch.counters().ports[2].spoofed == 5
    assert rig.switch.counters().check() == []


def test_unpinning_forgets_the_address_on_every_vlan() -> None:
    rig = three_ports()
    for vlan in (0, 5, 0xFFF):
        rig.ports[1].send([tagged(frame(9, 1), vlan)])
    receivers(rig)
    rig.switch.unpin("02:00:00:00:00:01")
    for vlan in (0, 5, 0xFFF):
        rig.ports[0].send([tagged(frame(1, 0), vlan)])
        assert receivers(rig) == [0, 1, 1]


@pytest.mark.parametrize("last", range(16))
def test_groups_of_the_link_are_not_forwarded(last: int) -> None:
    """IEEE 802.1Q, table 8-1; each bit of the mask lets one group through."""
    group = b"\x01\x80\xc2\x00\x00" + bytes([last])
    for mask, through in ((0, 0), (1 << last, 1), (0xFFFF ^ 1 << last, 0)):
        rig = three_ports(mask)
        rig.ports[0].send([frame(group, 1), tagged(frame(group, 1), 5)])
        assert receivers(rig) == [0, 2 * through, 2 * through]
        counters = rig.switch.counters()
        assert counters.ports[0].link_local == counters.ports[0].filtered == 2 - 2 * through
        assert counters.ports[0].multicast == 2 * through
        assert counters.check() == []


def test_a_frame_for_the_link_still_shows_where_its_sender_is() -> None:
    rig = three_ports()
    rig.ports[1].send([frame(b"\x01\x80\xc2\x00\x00\x0e", 1)])
    rig.ports[0].send([frame(1, 0)])
    assert receivers(rig) == [0, 1, 0]


@pytest.mark.parametrize(
    "group",
    [
        "0180c2000010",
        "0180c20000f0",
        "0180c2000100",
        "0180c3000000",
        "0100c2000000",
        "3380c2000000",
    ],
)
def test_other_groups_are(group: str) -> None:
    rig = three_ports()
    rig.ports[0].send([frame(bytes.fromhex(group), mac(1))])
    assert receivers(rig) == [0, 1, 1]
