"""T24: nothing in a window or a register makes a call longer than a stated limit.

The limit counts the work of a call for each frame (four lookups in lines of eight ways, eight tags)
and for each copy (of 2040 bytes at most). Fuzzing checks the same for loads and stores
(tests/rigs/switch/fuzz).
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from pykvm.switch import SwitchConfig
from pykvm.switch._native import ffi, lib
from tests.rigs.switch.native_rig import BROADCAST, Rig, frame, mac, make_rig
from tests.rigs.switch.single_step import single_steps
from tests.rigs.switch.variants import AS_BUILT, Build, build_variant

pytestmark = pytest.mark.unit

SEND = lib.SWITCH_OP_SEND
CONFIG = SwitchConfig(ports=4, lane_slots=8, tx_slots=8, frame_limit=lib.SWITCH_MAX_FRAME)
HOSTILE_CALLS = 12


def limit(ports: int, burst: int) -> int:
    """Return the limit on instructions of a call, for a switch with that many ports and slots.

    For the largest switch, 64 ports and 256 transmit slots, it is 8.2 million.
    """
    return 100 + burst * ports * 500


def most(build: Build, rig: Rig, a2: int, *, change: random.Random | None = None) -> int:
    """Return the instructions of a call with `a2` frames; counting stops just above the limit.

    Args:
        change: changes lengths and addresses in the window between any two instructions.
    """
    window = ffi.cast("struct switch_window *", rig.switch.window(0))
    steps = 0
    stop = 2 * limit(CONFIG.ports, CONFIG.tx_slots)
    stepping = single_steps(build.address, lambda: build.serve(SEND, 0, a2, rig))
    for _ in itertools.islice(stepping, stop):
        steps += 1
        if change is not None:
            slot = change.randrange(CONFIG.tx_slots)
            window.tx_length[slot] = change.choice((14, 31, 767, 768, 2040, 2041, 1 << 31))
            place = rig.switch.window(0) + CONFIG.tx_offset(slot)
            ffi.memmove(place, change.choice((BROADCAST, mac(1), mac(2), mac(77))), 6)
            ffi.memmove(place + 6, change.choice((mac(0), mac(1), mac(99))), 6)
    stepping.close()
    return steps


@pytest.mark.attack("T24")
@pytest.mark.parametrize("length", [14, 31, 32, 767, 768, 2040])
def test_a_full_burst_to_everybody(length: int) -> None:
    """The lengths are those at which copies change their method, and the longest."""
    rig = make_rig(CONFIG)
    rig.teach()
    for slot in range(CONFIG.tx_slots):
        rig.ports[0].put(slot, frame(BROADCAST, 200 + slot, size=length))
    steps = most(AS_BUILT, rig, CONFIG.tx_slots)
    assert rig.switch.counters().ports[0].copies == 3 * (CONFIG.tx_slots + 1)
    assert 1000 < steps <= limit(CONFIG.ports, CONFIG.tx_slots)


@pytest.mark.attack("T24")
def test_full_lines_of_the_table_and_frames_full_of_tags() -> None:
    """All sources and destinations meet in one full line of the table.

    They do so on their own VLAN and in the lookup of pins. The frames have the most tags that may
    make a frame longer.
    """
    config = SwitchConfig(ports=4, lane_slots=8, tx_slots=8, frame_limit=767 - 32)
    rig = make_rig(config)
    shared = ffi.cast("struct switch_shared *", rig.switch.address)

    def line(address: int, vlan: int) -> int:
        return int(lib.switch_station_line(lib.switch_station(shared, address, vlan)))

    crowd = (n for n in range(2, 1 << 24, 256) if line(n, lib.SWITCH_ANY_VLAN) == 7)
    for address in itertools.islice(crowd, 8):
        octets = address.to_bytes(6, "little")
        rig.switch.pin(":".join(f"{octet:02x}" for octet in octets), 1)
    some = list(itertools.islice(crowd, 100))
    vlan, meeting = next(
        (vlan, there)
        for vlan in range(1, lib.SWITCH_ANY_VLAN)
        if len(there := [n.to_bytes(6, "little") for n in some if line(n, vlan) == 7]) >= 2
    )
    for slot in range(config.tx_slots):
        tags = b"\x81\x00" + (slot << 13 | vlan).to_bytes(2, "big") + b"\x88\xa8\x00\x09" * 7
        one = frame(meeting[0], meeting[1], size=767)
        rig.ports[0].put(slot, one[:12] + tags + one[12 : -len(tags)])
    steps = most(AS_BUILT, rig, config.tx_slots)
    counters = rig.switch.counters().ports[0]
    assert counters.not_learned == counters.unknown == config.tx_slots
    assert 1000 < steps <= limit(config.ports, config.tx_slots)


@pytest.mark.attack("T24")
def test_rings_of_any_content_that_change_all_the_time() -> None:
    for seed in range(HOSTILE_CALLS):
        choice = random.Random(seed)
        rig = make_rig(CONFIG)
        for port in range(CONFIG.ports):
            window = rig.switch.window(port)
            ffi.memmove(window, choice.randbytes(0x3000), 0x3000)
        burst = choice.choice((1, CONFIG.tx_slots, CONFIG.tx_slots + 1, 256, 1 << 63))
        steps = most(AS_BUILT, rig, burst, change=choice)
        assert steps <= limit(CONFIG.ports, CONFIG.tx_slots)


@pytest.mark.control("T24")
def test_control_a_switch_that_takes_any_number_of_frames(tmp_path: Path) -> None:
    build = build_variant(
        tmp_path, "a2 > SWITCH_MAX_BURST || a2 > shared->tx_slots", "a2 > (1ull << 32)"
    )
    rig = make_rig(CONFIG)
    for slot in range(CONFIG.tx_slots):
        rig.ports[0].put(slot, frame(BROADCAST, 0, size=60))
    assert most(build, rig, 1 << 20) > limit(CONFIG.ports, CONFIG.tx_slots)
