"""Measured costs of attaching: pages by the plan, ticks of the host's own counter."""

import json

import pytest

from pykvm.kvm import Kvm
from pykvm.measure.attach import measure_attach

pytestmark = [pytest.mark.elisa, pytest.mark.counted]


def test_attach_detach_revoke() -> None:
    with Kvm() as kvm:
        record = measure_attach(kvm, 3, 1.0).as_dict()
    json.dumps(record)
    # One page of shared memory and one window: 17 tables of two EPTs, 10 of guest paging.
    pages = record["pages"]
    assert (pages["ept_tables"], pages["guest_tables"], pages["own"]) == (17, 10, 15)
    for name, samples in (("attach", 6), ("detach", 3), ("revoke", 3)):
        assert len(record[name]["samples"]) == samples
        assert record[name]["cost"] > 0
    # Both contexts are planned and built; taking them away is less work.
    assert record["attach"]["cost"] > record["detach"]["cost"]
