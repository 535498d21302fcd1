"""Guests that write anything into their windows at any moment, and vCPUs that stop anywhere."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.switch import SwitchConfig
from pykvm.switch._native import ffi, lib
from tests.rigs.switch.native_rig import BROADCAST, Rig, frame, mac, make_rig
from tests.rigs.switch.single_step import single_steps
from tests.rigs.switch.variants import AS_BUILT, Build, build_variant

pytestmark = pytest.mark.unit

HEADER_BYTES = 0x3000
SEND = lib.SWITCH_OP_SEND
SEEDS = 5


def guarded_rig() -> tuple[Rig, bytes]:
    """Return a rig of three ports, and the content of the window of port 2, which is idle."""
    rig = make_rig(SwitchConfig(ports=3, lane_slots=4, tx_slots=8))
    rig.teach()
    return rig, snapshot(rig, 2)


def snapshot(rig: Rig, port: int) -> bytes:
    return bytes(ffi.buffer(rig.switch.window(port), rig.switch.config.window_size))


@pytest.mark.attack("T13")
@settings(max_examples=150)
@given(
    header=st.binary(max_size=HEADER_BYTES),
    lengths=st.lists(
        st.one_of(st.integers(0, (1 << 32) - 1), st.integers(0, 2100)), min_size=8, max_size=8
    ),
    tails=st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, 8)),
    calls=st.lists(
        st.tuples(
            st.one_of(st.just(1), st.just(1 | lib.SWITCH_WAIT), st.integers(0, (1 << 64) - 1)),
            st.integers(0, (1 << 64) - 1),
            st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1)),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_any_window_and_any_arguments(
    header: bytes,
    lengths: list[int],
    tails: tuple[int, int],
    calls: list[tuple[int, int, int]],
) -> None:
    rig, before = guarded_rig()
    for port in (0, 1):
        ffi.buffer(rig.switch.window(port), len(header))[:] = header
    sender = ffi.cast("struct switch_window *", rig.switch.window(0))
    receiver = ffi.cast("struct switch_window *", rig.switch.window(1))
    for slot, length in enumerate(lengths):
        rig.ports[0].put(slot, frame(1, 0, mark=slot), length)
    sender.lane[1].tail, receiver.lane[0].tail = tails
    env = rig.switch.native_env(0)
    for arguments in calls:
        result = lib.elisa_serve(*arguments, env)
        assert result <= 8 or result >= (1 << 64) - 200
    counters = rig.switch.counters()
    assert counters.check() == []
    assert counters.ports[0].calls == len(calls) + 1  # the rig was taught with one
    assert snapshot(rig, 2) == before, "only unicast to port 1 was sent"
    # The switch still serves the other ports.
    rig.ports[2].send([frame(BROADCAST, 2, mark=9)])
    assert rig.switch.counters().check() == []
    rig.ports[1].send([frame(2, 1, mark=7)])
    assert rig.ports[2].receive(1) == [frame(2, 1, mark=7)]


def flip_between_instructions(build: Build, seed: int) -> tuple[list[int], int]:
    """Flip headers and lengths in the sender's window between any two instructions of a call.

    Returns:
        The numbers of frames that ports 1 and 2 got, and how many of those frames name another
        destination.
    """
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    window = ffi.cast("struct switch_window *", rig.switch.window(0))
    images = [ffi.from_buffer("uint8_t[]", frame(to, 0, size=64)) for to in (1, 2)]
    choice = random.Random(seed)
    for slot in range(8):
        rig.ports[0].put(slot, bytes(images[0]))
    for _ in single_steps(build.address, lambda: build.serve(SEND, 0, 8, rig)):
        slot = choice.randrange(8)
        place = rig.switch.window(0) + rig.switch.config.tx_offset(slot)
        for _ in range(4):
            ffi.memmove(place, images[choice.randrange(2)], 64)
            window.tx_length[slot] = choice.choice((0, 13, 64, 64, 64, 64, 1514, 1 << 31))
    received, elsewhere = [0, 0], 0
    for index, port in enumerate(rig.ports[1:]):
        for got in port.receive(0):
            assert len(got) in (64, 1514)
            received[index] += 1
            elsewhere += got[:12] != mac(index + 1) + mac(0)
    assert rig.switch.counters().check() == []
    return received, elsewhere


@pytest.mark.attack("T12")
def test_a_window_that_changes_during_the_call() -> None:
    """A frame is delivered with the destination that was looked up."""
    results = [flip_between_instructions(AS_BUILT, seed) for seed in range(SEEDS)]
    assert sum(received[0] for received, _ in results) > SEEDS
    assert sum(received[1] for received, _ in results) > SEEDS
    assert [elsewhere for _, elsewhere in results] == [0] * SEEDS


@pytest.mark.control("T12")
def test_control_a_switch_that_reads_headers_twice(tmp_path: Path) -> None:
    """If headers are read twice, the flipping guest's frames reach wrong ports."""
    build = build_variant(
        tmp_path,
        "\t((word *)to)[0] = header.low;\n",
        "\t((word *)to)[0] = ((const volatile word *)from)[0];\n",
    )
    assert any(flip_between_instructions(build, seed)[1] for seed in range(SEEDS))


def step_through(build: Build, rig: Rig) -> tuple[int, list[bytes]]:
    """Step through a call of port 0; at every instruction port 2 sends to port 1, which receives.

    Returns:
        The number of instructions, and the frames that port 1 got from port 0.
    """
    got: list[bytes] = []
    stops = 0
    for _ in single_steps(build.address, lambda: build.serve(SEND, 0, 3, rig)):
        other = frame(1, 2, mark=100 + stops)
        rig.ports[2].send([other])
        assert rig.ports[1].receive(2) == [other]
        got += rig.ports[1].receive(0)
        stops += 1
    return stops, got + rig.ports[1].receive(0)


def three_frames_to_send() -> tuple[Rig, list[bytes]]:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    sent = [frame(1, 0, mark=1), frame(BROADCAST, 0, mark=2), frame(1, 0, size=40, mark=3)]
    for slot, one in enumerate(sent):
        rig.ports[0].put(slot, one)
    return rig, sent


@pytest.mark.attack("T19")
def test_a_vcpu_that_stops_at_any_instruction_harms_nobody() -> None:
    """At every instruction of a call, another port's call works, and no partial work is visible."""
    rig, sent = three_frames_to_send()
    stops, got = step_through(AS_BUILT, rig)
    assert stops > 300
    assert got == sent, "only whole frames, in order"
    assert rig.ports[2].receive(0) == [sent[1]]
    assert rig.switch.counters().check() == []


@pytest.mark.attack("T19")
@pytest.mark.parametrize("instructions", [50, 120, 200, 260, 300, 340, 380, 420])
def test_a_vcpu_killed_in_the_middle(instructions: int) -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    sent = [frame(1, 0, mark=mark) for mark in range(4)]
    for slot, one in enumerate(sent):
        rig.ports[0].put(slot, one)
    steps = single_steps(AS_BUILT.address, lambda: AS_BUILT.serve(SEND, 0, 4, rig))
    for count, _ in enumerate(steps):
        if count == instructions:
            break
    steps.close()  # kills the child
    got = rig.ports[1].receive(0)
    assert got in ([], sent), "a run is published as a whole"
    assert lib.switch_port_inside(rig.ports[0]._shared, 0)
    # The others go on, the port itself comes back, and frames follow each other without a gap.
    rig.ports[2].send([frame(1, 2)])
    assert len(rig.ports[1].receive(2)) == 1
    rig.switch.disable(0, vcpu_gone=True)
    rig.switch.enable(0)
    rig.ports[0].send([frame(1, 0, mark=50)])
    assert [one[14] for one in rig.ports[1].receive(0)][-1] == 50
    assert rig.switch.counters().ports[0].calls == 3


@pytest.mark.control("T19")
def test_control_a_switch_that_publishes_before_it_copies(tmp_path: Path) -> None:
    build = build_variant(
        tmp_path,
        "\t\tindex = transmit_slot(shared, first + done);\n",
        "\t\tindex = transmit_slot(shared, first + done);\n"
        "\t\tSTORE_RELEASE(open.control->head, open.head + count - done);\n",
    )
    rig, sent = three_frames_to_send()
    assert step_through(build, rig)[1] != sent
