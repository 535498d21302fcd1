"""Builds of everything that the attacks run.

The emulated host has no compiler and takes these results from the cache.
"""

import pytest

from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import build_object, crossing_images
from tests.rigs.attacks.edits import BY_GS, BY_SSE, NO_BOUND, NO_CLD, NO_STACK, UNCHECKED, WRITES
from tests.rigs.attacks.host_tables import RECKLESS
from tests.rigs.attacks.leap import Leaper
from tests.rigs.attacks.objects import FAULTY, LEAKING_NOP, SLOW, WILD_DECLARATION
from tests.rigs.attacks.segments import Jumper
from tests.rigs.attacks.victim import VAULT
from tests.rigs.attacks.weak_contexts import edited_object, weak_gate, weak_sub_entry

pytestmark = pytest.mark.unit

LEFT_OUT = (Protection.SLOT_CLEARING, Protection.GATE_CHECK)


def test_guests_and_objects() -> None:
    assert Leaper().image().address_of("leap_back")
    assert Jumper().image().address_of("segments_return")
    for source in (VAULT, FAULTY, SLOW):
        assert "vault_copy" in build_object([source]).symbols
    assert "vault_copy" in build_object([VAULT], user=True).symbols
    for declaration in (WILD_DECLARATION, LEAKING_NOP, RECKLESS):
        declaration.open().close()


@pytest.mark.parametrize("protection", LEFT_OUT)
def test_builds_without_a_protection(protection: Protection) -> None:
    without = frozenset({protection})
    weak = build_object([VAULT], without=without), crossing_images(without)
    assert weak != (build_object([VAULT]), crossing_images())


def test_edited_builds() -> None:
    assert weak_gate(NO_CLD) != crossing_images().gate_page
    assert weak_sub_entry(VAULT, NO_STACK).parts[0] != build_object([VAULT]).parts[0]
    assert edited_object(VAULT, NO_BOUND).parts[1] != build_object([VAULT]).parts[1]
    for edit in (BY_GS, BY_SSE):
        assert edited_object(VAULT, edit, without=UNCHECKED) != build_object([VAULT])
    assert edited_object(FAULTY, WRITES).parts[1] != build_object([FAULTY]).parts[1]
