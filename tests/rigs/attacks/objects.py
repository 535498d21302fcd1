"""Shared objects that the attacks run, besides the vault."""

from dataclasses import replace
from typing import Final

from pykvm.elisa.objects import SharedObject
from pykvm.elisa.protections import Protection
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.victim import DECLARATION, WINDOW_PAGES
from tests.rigs.probe import WILD
from tests.rigs.sources import OBJECTS

FAULTY: Final = OBJECTS / "faulty.c"
FAULTY_DECLARATION: Final = replace(DECLARATION, name="faulty", source=FAULTY)

SLOW: Final = OBJECTS / "slow.c"
SLOW_DECLARATION: Final = replace(DECLARATION, name="slow", source=SLOW)

LEAKING_NOP: Final = SharedObject(
    "nop",
    GUEST_SOURCES / "objects" / "nop.c",
    window=WINDOW_PAGES * PAGE_SIZE,
    without={Protection.REGISTER_CLEARING},
)
"""An object that leaves in registers what the gate loaded."""

WILD_DECLARATION: Final = SharedObject(
    "wild",
    WILD,
    guests=2,
    window=WINDOW_PAGES * PAGE_SIZE,
    without={Protection.CODE_CHECK},
)
