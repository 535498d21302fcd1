"""The filter's code says what its rules say: by an interpreter, for any rules and arguments."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.sandbox.confinement import Confinement
from pykvm.sandbox.filter_program import Instruction, Match, assemble, packed
from pykvm.sandbox.policy import REFUSED_ANSWER, policy_for
from tests.rigs.system_call_filter import ALLOW, ENOSYS, EPERM, I386, KILL, X86_64, answer

pytestmark = pytest.mark.unit

WORD = st.integers(0, (1 << 64) - 1)
ARGUMENTS = st.lists(WORD | st.integers(0, 7), min_size=6, max_size=6)
NUMBER = st.integers(0, 12)


def holds(match: Match, arguments: Sequence[int]) -> bool:
    return arguments[match.argument] & match.mask == match.value


@st.composite
def matches(draw: st.DrawFn) -> Match:
    mask = draw(WORD.filter(bool) | st.sampled_from([1, 3, 0xFF00, 0xFFFFFFFF, (1 << 64) - 1]))
    value = draw(WORD | st.integers(0, 7)) & mask
    return Match(draw(st.integers(0, 5)), value, mask)


RULES = st.lists(st.lists(matches(), max_size=3), max_size=4)


@given(st.dictionaries(NUMBER, RULES, max_size=5), st.sets(NUMBER), NUMBER, ARGUMENTS, st.data())
def test_any_rules(
    checked: dict[int, list[list[Match]]],
    allowed: set[int],
    number: int,
    arguments: list[int],
    data: st.DataObject,
) -> None:
    actions = dict.fromkeys(allowed - checked.keys(), ALLOW)
    program = packed(assemble(checked, actions, EPERM))
    if rules := checked.get(number):
        # Arguments by chance hardly ever fit: make some of them fit.
        for match in data.draw(st.sampled_from(rules)):
            if data.draw(st.booleans()):
                kept = arguments[match.argument] & ~match.mask
                arguments[match.argument] = kept | match.value
    fits = any(all(holds(match, arguments) for match in rule) for rule in checked.get(number, []))
    wanted = ALLOW if fits or number in actions else EPERM
    assert answer(program, number, arguments) == wanted


def test_other_abis_end_the_process() -> None:
    program = packed(assemble({1: [[]]}, {0: ALLOW}, EPERM))
    assert answer(program, 0) == answer(program, 1) == ALLOW
    assert answer(program, 0, architecture=I386) == KILL
    assert answer(program, 0x40000000) == KILL  # read() of x32
    assert answer(program, 0x40000001) == KILL
    assert answer(program, -1) == KILL
    assert answer(program, 0x3FFFFFFF) == EPERM


@pytest.mark.parametrize("match", [(6, 0), (-1, 0), (0, 1, 2), (0, 0, 0), (0, 0, 1 << 64)])
def test_conditions_that_cannot_hold(match: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        Match(*match)


def test_filters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"system calls \[3\] have two answers"):
        assemble({3: []}, {3: ALLOW}, EPERM)
    many = [[Match(0, number)] for number in range(200)]
    with pytest.raises(ValueError, match="rules for system call 1 of 601 instructions"):
        assemble({1: many}, {}, EPERM)
    with pytest.raises(ValueError, match="linux takes 4096"):
        assemble({}, dict.fromkeys(range(3000), ALLOW), EPERM)


def test_layout() -> None:
    """As struct sock_filter in linux/filter.h."""
    assert packed([Instruction(0x15, 1, 2, 0xC000003E)]) == struct.pack("<HBBI", 21, 1, 2, X86_64)


def test_the_policy_and_its_filter_agree() -> None:
    """For every number that Linux has, and many that it has not."""
    policy = policy_for(Confinement())
    program = packed(assemble(policy.checked, policy.actions, REFUSED_ANSWER))
    for number in set(range(1200)) - policy.checked.keys():
        assert answer(program, number, [1] * 6) == policy.actions.get(number, EPERM), number
    assert set(policy.actions.values()) == {ALLOW, KILL, ENOSYS}
    assert next(iter(policy.checked)) == 16, "ioctl comes first: vcpus are run by it"
