"""Removal of defences: temporary, and only with modules of test builds."""

from pathlib import Path

import pytest

from tests.attacks.marks import ROOT
from tests.rigs.attacks import weaken
from tests.rigs.attacks.weaken import NotWeakenedError, Weaken, weakened
from tools import attacks as suite


@pytest.mark.unit
def test_ordinary_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weaken, "PARAMETER", tmp_path / "elisa_weaken")
    with pytest.raises(NotWeakenedError, match="no parameter elisa_weaken; run: pykvm testbed"):
        weakened(Weaken.MODE).__enter__()
    assert not (tmp_path / "elisa_weaken").exists()


@pytest.mark.unit
def test_defences_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = tmp_path / "elisa_weaken"
    parameter.write_text("0")
    monkeypatch.setattr(weaken, "PARAMETER", parameter)
    with weakened(Weaken.EVENTS | Weaken.INIT):
        assert parameter.read_text() == "20"
    assert parameter.read_text() == "0"
    with pytest.raises(KeyError), weakened(Weaken.LIST):
        raise KeyError
    assert parameter.read_text() == "0"


@pytest.mark.unit
def test_weakened_controls_run_on_a_host_of_their_own() -> None:
    _, inside, weak = suite.plan("6.1", two=False)
    assert weak.where[-4:-2] == ("--also", str(weaken.PATCH))
    assert "--also" not in inside.where
    assert set(weak.files) <= set(inside.files)
    for file in weak.files:
        assert "mark.weakened" in (ROOT / file).read_text()


@pytest.mark.elisa
def test_the_loaded_modules_have_no_such_parameter() -> None:
    """Modules other than test builds are the product, which has no such parameter."""
    if weaken.PARAMETER.exists():
        pytest.skip("these modules are a test build")
    with pytest.raises(NotWeakenedError), weakened(Weaken(0)):
        pass
