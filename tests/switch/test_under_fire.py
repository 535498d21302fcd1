"""Guests killed and stopped at random points of the switch do not disturb the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvm.resources import GUEST_SOURCES
from tests.rigs.switch.fire.processes import Fire, StuckError, build_guest

pytestmark = pytest.mark.unit

KILLS = 240


@pytest.mark.attack("T19")
def test_eight_guests_under_fire(tmp_path: Path) -> None:
    with Fire(build_guest(tmp_path), seed=1) as fire:
        fire.start()
        fire.run(KILLS)
        fire.finish()
        print(dict(fire.events))
        assert fire.events["killed"] >= 200
        # Some guests must have been hit inside the switch.
        assert fire.events["killed inside the switch"] >= 10
        assert fire.events["stopped inside the switch"] >= 1
        assert fire.events["frames delivered"] > 100_000


def with_a_lock(directory: Path) -> Path:
    """Write a naive switch with a lock, which allows one call at a time."""
    source = (GUEST_SOURCES / "switch/switch.c").read_text()
    old = "\t\tresult = send(&call, (uint32_t)a1, (uint32_t)a2, a0 & SWITCH_WAIT);\n"
    assert source.count(old) == 1
    locked = directory / "locked.c"
    locked.write_text(
        source.replace(
            old,
            "\t\tuint64_t *lock = &shared->lane[0][0].full; /* nobody's lane */\n\n"
            "\t\twhile (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))\n"
            '\t\t\t__asm__ volatile("pause");\n'
            f"{old}\t\tSTORE_RELEASE(*lock, 0);\n",
        )
    )
    return locked


@pytest.mark.control("T19")
def test_control_a_lock_that_the_dead_keep(tmp_path: Path) -> None:
    with Fire(build_guest(tmp_path, with_a_lock(tmp_path)), seed=1, patience=8) as fire:
        fire.start()
        with pytest.raises(StuckError):
            fire.run(KILLS)
        print(dict(fire.events))
