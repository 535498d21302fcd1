"""Counted cost of each protection against stored numbers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.elisa.protections import Protection
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.measure.prebuild import build_images
from pykvm.measure.protection_cost import MEASURED, Protections, measure_protections

STORED = Path(__file__).parents[2] / "benchmarks" / "expected.json"
EXPECTED = json.loads(STORED.read_text())["protections"]
CALLS = 50


@pytest.fixture(scope="module")
def measured() -> Iterator[Protections]:
    with Kvm() as kvm:
        yield measure_protections(kvm, CALLS, 1.0)


@pytest.mark.unit
def test_every_protection_of_the_crossing_is_measured() -> None:
    assert {one.protection for one in MEASURED} == set(Protection) - {Protection.CODE_CHECK}
    assert set(EXPECTED["cost"]) == {one.protection.name.lower() for one in MEASURED}


@pytest.mark.unit
def test_every_build_can_be_made() -> None:
    """Building fills the cache for the emulated host, which would take long to compile."""
    build_images()


@pytest.mark.elisa
@pytest.mark.counted
def test_the_record(measured: Protections) -> None:
    record = measured.as_dict()
    json.dumps(record)
    assert [one["name"] for one in record["protections"]] == list(EXPECTED["cost"])
    for one in [record["kernel"], record["user"], *record["protections"]]:
        assert len(one["samples"]) == CALLS
    for one in record["protections"]:
        # What weak processors need comes on top of a usual call, the rest is part of it.
        usual = one["call_without"] + (0 if one["for_weak_processors"] else one["cost"])
        assert usual == record[one["mode"]]["cost"]


@pytest.mark.elisa
@pytest.mark.counted
def test_costs(measured: Protections) -> None:
    if not is_emulated():
        pytest.skip("the time stamp counter counts instructions on the emulated host only")
    record = measured.as_dict()
    assert {mode: record[mode]["cost"] for mode in ("kernel", "user")} == {
        mode: EXPECTED[mode] for mode in ("kernel", "user")
    }
    assert max(EXPECTED["kernel"], EXPECTED["user"]) <= 48  # the maximum that the design allows
    assert {one["name"]: one["cost"] for one in record["protections"]} == EXPECTED["cost"]
