"""The comparison with the emulator agrees on the built pages, and can disagree."""

import pytest

from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import build_object, crossing_images
from pykvm.resources import GUEST_SOURCES
from pykvm.verify.crosscheck import check_gate, check_sub
from pykvm.verify.gate import prove_gate
from pykvm.verify.roots import check_roots

pytestmark = pytest.mark.unit

SEED = 20


def test_the_gate_ends_where_the_paths_say() -> None:
    page = crossing_images().gate_page
    compared = check_gate(page, prove_gate(page), seed=SEED, states=8, idle_states=1)
    assert compared.disagreements == []
    assert compared.states > 3 * 4096
    assert {"official sub entry", "default context", "trap"} <= compared.ends.keys()


def test_another_page_than_the_one_that_was_followed_disagrees() -> None:
    """Control: only the emulator's copy lacks a comparison."""
    page = crossing_images().gate_page
    weak = crossing_images(frozenset({Protection.GATE_CHECK})).gate_page
    assert not check_gate(weak, prove_gate(page), seed=SEED, states=2, idle_states=0).holds


@pytest.mark.parametrize("user", [False, True])
def test_whole_calls(user: bool) -> None:
    nop = [GUEST_SOURCES / "objects" / "nop.c"]
    compared = check_sub(build_object(nop, user=user), user=user, seed=SEED, states=50)
    assert compared.disagreements == []
    assert compared.states == 150
    left_out = build_object(nop, user=user, without=frozenset({Protection.REGISTER_CLEARING}))
    assert not check_sub(left_out, user=user, seed=SEED, states=2).holds


def test_roots() -> None:
    proof = check_roots(crossing_images().gate_page)
    assert proof.findings == []
    assert proof.walks > 100
