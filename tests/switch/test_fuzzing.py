"""The fuzzer finds planted faults, and none in the switch as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.fuzz.inputs import read_corpus
from tests.rigs.switch.fuzz.fuzzer import CORPUS, FINDINGS, Fuzzer, missing_tools

pytestmark = pytest.mark.unit

SECONDS = 300  # at most: a fault is found in a few, by an idle processor
"""Seconds for each fault; most are found in the first."""

FAULTS = {
    "a frame longer than the limit": (
        "if (UNLIKELY(length - run.format.shortest > run.format.spread) &&",
        "if (length < run.format.shortest &&",
    ),
    "a longer frame in the middle of a run": (
        "if (UNLIKELY(length - run->format.shortest > run->format.spread))",
        "if (length < run->format.shortest)",
    ),
    "the length read again after it was checked": (
        "\t\tto = resolve(call, run.header, run.format.vlan, &kind);\n",
        "\t\tto = resolve(call, run.header, run.format.vlan, &kind);\n"
        "\t\tlength = READ_ONCE(window->tx_length[index]);\n",
    ),
    "the header read again when it is copied": (
        "\t((word *)to)[0] = header.low;\n",
        "\t((word *)to)[0] = ((const volatile word *)from)[0];\n",
    ),
    "only the first frame of a run looked up": (
        "if (UNLIKELY(header.low != run->header.low ||",
        "if (0 && UNLIKELY(header.low != run->header.low ||",
    ),
    "a receiver's tail believed": (
        "open.bad_tail = used > shared->lane_slots;",
        "open.bad_tail = false;",
    ),
    "a transmit slot that does not exist": (
        "return (uint32_t)elisa_mask_nospec(position, shared->tx_slots);",
        "return position;",
    ),
    "a lane slot that does not exist": (
        "uint64_t slot = (uint64_t)(open.head & slot_mask) * SWITCH_SLOT_BYTES;",
        "uint64_t slot = (uint64_t)open.head * SWITCH_SLOT_BYTES;",
    ),
    "a run across the end of the transmit slots": (
        "smaller(shared->lane_slots - at, shared->tx_slots - index)",
        "shared->lane_slots - at",
    ),
    "more frames than there are slots": (
        "a2 > SWITCH_MAX_BURST || a2 > shared->tx_slots",
        "a2 > SWITCH_MAX_BURST",
    ),
    "a frame to a port that is not enabled": (
        "if (found == FLOOD ? !others : !(others >> found & 1)) {",
        "if (found == FLOOD && !others) {",
    ),
    "a frame back to its sender": (
        "uint64_t others = call->enabled & ~(1ULL << call->id);\n\tuint32_t slot_mask",
        "uint64_t others = call->enabled;\n\tuint32_t slot_mask",
    ),
    "another port's address taken": (
        "} else if (found != call->id) {",
        "} else if (found == SWITCH_MAX_PORTS + 1) {",
    ),
    "a frame that ends inside its tag": (
        ".shortest = SWITCH_MIN_FRAME + SWITCH_TAG_BYTES,",
        ".shortest = SWITCH_MIN_FRAME,",
    ),
    "a longer frame without a tag": (
        "run.format.bits == UNTAGGED_BITS || !has_tags_for",
        "!has_tags_for",
    ),
    "a longer frame with fewer tags than that takes": (
        "if (tags == SWITCH_MAX_TAGS || !is_tag(READ_ONCE(*type)))",
        "if (tags == SWITCH_MAX_TAGS)",
    ),
    "a station looked up on another VLAN": (
        "found = look_up(shared, switch_station(shared, destination, vlan));",
        "found = look_up(shared, switch_station(shared, destination, 0));",
    ),
    "frames of two VLANs in one run": (
        "((header.high ^ run->header.high) & run->format.bits)",
        "(uint32_t)(header.high ^ run->header.high)",
    ),
    "a frame for the link alone": (
        "if (is_link_local(shared, destination)) {",
        "if (shared->group_forward_mask > 0xffff) {",
    ),
    "a frame from a group": (
        "if ((source & 1) || source == 0) {",
        "if (source == 0) {",
    ),
    "frames published before they are counted": (
        "\t\tport->copies += put.frames;\n",
        "\t\tclose_lane(&open, (uint32_t)put.frames, put.bytes);\n"
        "\t\tport->copies += put.frames;\n",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if missing := missing_tools():
        pytest.skip(missing)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzzer"))


def test_nothing_that_was_found_is_wrong_again(fuzzer: Fuzzer, tmp_path: Path) -> None:
    findings = read_corpus(FINDINGS)
    outcome = fuzzer.run(0, corpus=tmp_path / "findings", inputs=findings)
    assert outcome.finding == "", outcome.output
    assert outcome.executions >= len(findings)


def test_the_seed_corpus_reaches_all_of_the_switch(fuzzer: Fuzzer, tmp_path: Path) -> None:
    """The corpus breaks nothing, and every load and store is checked."""
    seeds = read_corpus(CORPUS)
    outcome = fuzzer.run(0, corpus=tmp_path / "seeds", inputs=seeds)
    assert outcome.finding == "", outcome.output
    assert outcome.executions >= len(seeds)
    reached = fuzzer.coverage(seeds)
    assert (reached.lines, reached.branches) == (100, 100)


@pytest.mark.control("T13")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    outcome = Fuzzer(tmp_path, FAULTS[name]).run(SECONDS, inputs=read_corpus(CORPUS))
    assert outcome.finding, f"not found in {outcome.executions} executions"
    print(f"{name}: {outcome.executions} executions, {outcome.finding}")
