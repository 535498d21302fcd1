"""Measured costs of attaching: pages by the plan, ticks of the host's own counter."""

import json

import pytest

from pykvm.kvm import Kvm
from pykvm.measure.attach import ATTACHMENTS, measure_attach

pytestmark = [pytest.mark.elisa, pytest.mark.counted]


def test_attach_detach_revoke() -> None:
    with Kvm() as kvm:
        record = measure_attach(kvm, 1, 2, 1.0).as_dict()
    json.dumps(record)
    assert record["mib"] == 1
    # 16 tables of two EPTs and 9 of guest paging.
    pages = record["pages"]
    assert (pages["ept_tables"], pages["guest_tables"], pages["own"]) == (16, 9, 14)
    assert len(pages["charged"]) == ATTACHMENTS
    assert len(set(pages["charged"])) == 1
    # A MiB, a page for each window, a table for the GiB and one for 2 MiB.
    assert record["registered"] == {"charged": 256 + 64 + 2, "tables": 2, "large": 0}
    for name, samples in (("attach first", 4), ("attach last", 4), ("detach", 4), ("revoke", 4)):
        assert len(record[name]["samples"]) == samples
        assert record[name]["cost"] > 0
    # Both contexts are planned and built; taking them away is less work.
    assert record["attach first"]["cost"] > record["detach"]["cost"]
