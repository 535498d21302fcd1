"""exchange.c and burst.c: over the mapped switch on any /dev/kvm, by all paths with the patch."""

import random
from contextlib import ExitStack

import pytest

from pykvm.kvm import Kvm
from pykvm.machine.bare.failures import GuestAssertionError
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import connect
from pykvm.measure.programs import (
    BurstProgram,
    ExchangeProgram,
    Phase,
    SwitchPath,
    frame_records,
    received_frames,
    send_samples,
)
from pykvm.switch import SwitchConfig
from pykvm.switch.hosted import HostedSwitch

pytestmark = pytest.mark.kvm

STATIONS = [bytes.fromhex(f"0200000000{n:02x}") for n in range(4)]
TIMEOUT = 120
PATHS = [
    pytest.param(SwitchPath.DIRECT, id="direct"),
    pytest.param(SwitchPath.VMCALL, id="vmcall", marks=pytest.mark.elisa),
    pytest.param(SwitchPath.VMFUNC, id="vmfunc", marks=pytest.mark.elisa),
]


def conversation(own: int, other: int, count: int, seed: int) -> list[bytes]:
    """Return `count` frames of random content, of 60 to 1514 bytes."""
    dice = random.Random(seed)
    return [
        STATIONS[other]
        + STATIONS[own]
        + b"\x88\xb5"
        + dice.randbytes(dice.choice((46, 100, 577, 1500)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("path", PATHS)
def test_two_guests_exchange_frames(kvm: Kvm, path: SwitchPath) -> None:
    """Every frame arrives once, in order and unchanged, also through lanes that are too small."""
    frames = [conversation(0, 1, 60, seed=1), conversation(1, 0, 40, seed=2)]
    rounds = 2
    with HostedSwitch(SwitchConfig(ports=2, lane_slots=16)) as hosted, ExitStack() as stack:
        guests = []
        for port in (0, 1):
            program = ExchangeProgram(
                path, expected=rounds * len(frames[1 - port]), burst=8, rounds=rounds
            )
            guest = stack.enter_context(BareGuest(kvm, program))
            guest.set_input(frame_records(frames[port]))
            connect(guest, hosted, port, path)
            guests.append(guest)
        for guest in guests:
            guest.start()
        assert [guest.wait(TIMEOUT) for guest in guests] == [0, 0]
        for port, guest in enumerate(guests):
            sent, received, samples, log_bytes, _ = guest.results()[:5]
            assert sent == rounds * len(frames[port])
            assert received == rounds * len(frames[1 - port])
            arrived = list(received_frames(guest.log(log_bytes)))
            assert {frame.source for frame in arrived} == {1 - port}
            assert [frame.data for frame in arrived] == frames[1 - port] * rounds
            calls = send_samples(guest.samples(), samples)
            assert sum(call.sent for call in calls) == sent
            assert all(0 < call.sent <= call.wanted <= 8 and call.cycles > 0 for call in calls)
        counters = hosted.switch.counters()
        assert counters.check() == []
        assert counters.sent_by(0).delivered == rounds * len(frames[0])


def test_a_guest_without_a_peer_gives_up(kvm: Kvm) -> None:
    with HostedSwitch(SwitchConfig(ports=2, lane_slots=16)) as hosted:
        program = ExchangeProgram(SwitchPath.DIRECT, expected=1, idle_limit=1000)
        with BareGuest(kvm, program) as guest:
            guest.set_input(frame_records(conversation(0, 1, 64, seed=3)))
            connect(guest, hosted, 0, SwitchPath.DIRECT)
            hosted.switch.enable(1)  # nothing empties its lane of 16 frames
            assert guest.run() == 1
            sent, received, _, log_bytes, waited = guest.results()[:5]
    assert (sent, received, log_bytes) == (16, 0, 0)
    assert waited > 0


def test_a_disabled_port_is_an_assertion_of_the_guest(kvm: Kvm) -> None:
    with HostedSwitch(SwitchConfig(ports=2, lane_slots=16)) as hosted:
        program = ExchangeProgram(SwitchPath.DIRECT, expected=0)
        with BareGuest(kvm, program) as guest:
            guest.set_input(frame_records(conversation(0, 1, 1, seed=4)))
            connect(guest, hosted, 0, SwitchPath.DIRECT)
            hosted.switch.disable(0)
            with pytest.raises(GuestAssertionError, match=r"frames\.c:\d+"):
                guest.run()


@pytest.mark.parametrize("path", PATHS)
def test_three_guests_send_bursts_around(kvm: Kvm, path: SwitchPath) -> None:
    """Each sends to the next one; nothing is lost, and each phase is enclosed in marks."""
    phases = [Phase(64, 32, 4), Phase(1514, 4, 8), Phase(64, 1, 10)]
    total = sum(phase.frames for phase in phases)
    count = 3
    marks: list[int] = []
    with HostedSwitch(SwitchConfig(ports=count, lane_slots=32)) as hosted, ExitStack() as stack:
        for port in range(count):
            hosted.switch.pin(STATIONS[port].hex(":"), port)
        guests = []
        for port in range(count):
            program = BurstProgram(
                path,
                own=STATIONS[port],
                to=STATIONS[(port + 1) % count],
                phases=phases,
                expected=total,
            )
            guest = stack.enter_context(BareGuest(kvm, program))
            connect(guest, hosted, port, path)
            guests.append(guest)
        for port, guest in enumerate(guests):
            guest.start(marks.append if port == 0 else None)
        assert [guest.wait(TIMEOUT) for guest in guests] == [0] * count
        for guest in guests:
            sent, received, samples, received_bytes, _ = guest.results()[:5]
            assert (sent, received) == (total, total)
            assert received_bytes == sum(p.frames * p.frame_bytes for p in phases)
            calls = send_samples(guest.samples(), samples)
            whole = [call.wanted for call in calls if call.sent == call.wanted]
            assert len(whole) >= sum(phase.bursts for phase in phases) - 1
        assert hosted.switch.counters().check() == []
    assert marks == [0, 1, 2, 3, 4, 5]
