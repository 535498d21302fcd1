"""Two guests replay captures with more than two stations, VLANs and tagged full frames."""

import random

import pytest

from pykvm.kvm import Kvm
from pykvm.measure.exchange import ExchangeDroppedError, ExchangeTooLargeError, check_room, exchange
from pykvm.measure.programs import SwitchPath
from pykvm.switch.capture import Capture, Frame, split_capture
from tests.rigs.switch.native_rig import BROADCAST, frame, tagged

ROUNDS = 3


def server_capture() -> list[list[bytes]]:
    """Return a split capture of a server with three clients, one of them on a VLAN.

    It is what tcpdump sees on the server.
    """
    dice = random.Random(1)
    frames = [frame(BROADCAST, client) for client in (1, 2, 3)]
    for mark in range(40):
        client, size = dice.choice((1, 2, 3)), dice.choice((60, 200, 1514))
        both = frame(0, client, 60, mark), frame(client, 0, size, mark)
        frames += [tagged(one, 100) for one in both] if client == 3 else both
    sides = split_capture(Capture([Frame(0, one, number) for number, one in enumerate(frames, 1)]))
    return [[one.data for one in side] for side in sides.sent]


@pytest.mark.elisa
@pytest.mark.parametrize("path", SwitchPath)
def test_a_server_and_three_clients(kvm: Kvm, path: SwitchPath) -> None:
    sides = server_capture()
    assert max(len(one) for side in sides for one in side) == 1518
    done = exchange(kvm, path, sides, rounds=ROUNDS)
    assert done.sent == done.delivered == ROUNDS * sum(map(len, sides)) == ROUNDS * 83
    assert done.corrupted == 0
    assert not any(done.dropped.values())


@pytest.mark.elisa
def test_stations_of_one_side_are_no_busy_host(kvm: Kvm) -> None:
    """Frames that the switch filters never arrive; the error names that, and not the load."""
    sides = [[frame(1, 0), frame(2, 0)], [frame(0, 1), frame(2, 1), frame(0, 2)]]
    with pytest.raises(ExchangeDroppedError) as refusal:
        exchange(kvm, SwitchPath.VMFUNC, sides, rounds=2, idle_limit=100_000)
    assert "did not forward" in refusal.value.problem
    assert "same_port" in refusal.value.problem
    assert "load" not in str(refusal.value)


@pytest.mark.unit
def test_room_in_a_guest() -> None:
    sides = [[bytes(1512)] * 1024, [bytes(60)]]  # 1.5 MiB in its memory
    check_room(sides, 18)
    with pytest.raises(ExchangeTooLargeError) as refusal:
        check_room(sides, 20)
    assert refusal.value.next_step == "send them less often: --rounds 18"
    with pytest.raises(ExchangeTooLargeError, match="17 MiB of frames to send"):
        check_room([[bytes(1512)] * 11264, []], 1)
