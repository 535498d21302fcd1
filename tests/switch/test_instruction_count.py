"""Cost of the switch to a sender in instructions, with a limit against unnoticed growth."""

from __future__ import annotations

import pytest

from pykvm.switch import SwitchConfig
from pykvm.switch._native import lib
from tests.rigs.switch.native_rig import frame, make_rig
from tests.rigs.switch.single_step import count_instructions
from tests.rigs.switch.variants import AS_BUILT

pytestmark = pytest.mark.unit

CROSSING = 48
"""Instructions that the crossing may take; the limit on both together is 90 per packet."""


def instructions(size: int, burst: int) -> int:
    """Count the instructions of a call that sends `burst` unicast frames of `size` bytes.

    The destination's address is learned.
    """
    rig = make_rig(SwitchConfig())
    rig.teach()
    sent = [frame(1, 0, size=size, mark=mark) for mark in range(burst)]
    for slot, one in enumerate(sent):
        rig.ports[0].put(slot, one)
    count = count_instructions(
        AS_BUILT.address, lambda: AS_BUILT.serve(lib.SWITCH_OP_SEND, 0, burst, rig)
    )
    assert rig.ports[1].receive(0) == sent, "counted, but not sent"
    return count


def test_sixty_four_bytes_in_bursts_of_32() -> None:
    count = instructions(64, 32)
    assert (count + CROSSING) / 32 <= 70
    assert instructions(64, 32) == count, "the count repeats exactly"


@pytest.mark.parametrize(
    ("size", "burst", "limit"),
    [(64, 1, 440), (64, 256, 60), (1514, 32, 260), (512, 32, 265), (767, 32, 380)],
)
def test_other_sizes_and_bursts(size: int, burst: int, limit: int) -> None:
    assert instructions(size, burst) / burst <= limit
