"""`pykvm doctor` on the machine that runs the tests."""

import json

import pytest

from pykvm.cli.main import main
from pykvm.host.emulation import is_emulated
from pykvm.kernel import modules


@pytest.mark.unit
def test_report_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor"])
    report = capsys.readouterr().out
    verdict = report.splitlines()[-1]
    if status == 0:
        assert modules.elisa_version() > 0
        assert verdict == "This host runs ELISA itself."
    else:
        assert status == 1
        assert "missing" in report
        assert "-> " in report
        assert "pykvm testbed -- COMMAND" in verdict or "neither" in verdict


@pytest.mark.unit
def test_json_agrees_with_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert findings["elisa_here"] == (status == 0)
    assert len(findings["checks"]) > 10
    for check in findings["checks"]:
        assert bool(check["next_step"]) != check["ok"], check
    assert findings["fingerprint"]["host"] == ("emulated" if is_emulated() else "hardware")


@pytest.mark.elisa
def test_the_patched_host_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "ELISA version" in capsys.readouterr().out
