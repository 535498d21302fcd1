"""Builds of every guest and object that the tests of this directory run.

They fill the cache for the emulated host, which would take long to compile.
"""

import pytest

from pykvm.elisa.trusted_images import build_object
from pykvm.machine.bare import layout
from pykvm.machine.bare.build import build_guest
from pykvm.measure.programs import CrossingProgram, ExchangeProgram, SwitchPath, Way
from pykvm.resources import GUEST_SOURCES
from tests.rigs.sources import GUESTS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["intruder.c", "registers.c", "selftest.c"])
def test_guests(name: str) -> None:
    assert build_guest([GUESTS / name]).entry == layout.IMAGE_GPA


@pytest.mark.parametrize("name", ["objects/nop.c", "objects/counter.c", "switch/switch.c"])
def test_objects(name: str) -> None:
    assert "elisa_serve" in build_object([GUEST_SOURCES / name]).symbols


def test_programs() -> None:
    for program in (CrossingProgram(1, [Way.EMPTY]), ExchangeProgram(SwitchPath.DIRECT, 1)):
        assert program.image().entry == layout.IMAGE_GPA
