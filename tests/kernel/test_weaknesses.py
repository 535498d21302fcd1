"""What contexts do about a processor's weaknesses, and what the administrator accepts."""

from pathlib import Path

import pytest

from pykvm.host.weaknesses import Weakness
from pykvm.kernel import weaknesses
from pykvm.kernel.weaknesses import ALL, NONE, Answer, UnknownWeaknessError, Weak, answer_to
from tests.rigs.messages import one_line

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parameter that accepts nothing, on a processor of which KVM says nothing."""
    file = tmp_path / "elisa_accept"
    file.write_text("\n")
    monkeypatch.setattr(weaknesses, "PARAMETER", file)
    monkeypatch.setattr(weaknesses, "present", lambda: NONE)
    return file


def _answer(name: str, kernel: str, kind: str) -> Answer:
    return answer_to(Weakness(name, "a guest may read it", kernel, kind))


def test_names() -> None:
    assert weaknesses.names_of(ALL) == ["l1tf", "buffers", "returns", "microcode", "siblings"]
    assert weaknesses.parse("") == weaknesses.parse(" , ") == NONE
    assert weaknesses.parse("all") == ALL
    assert weaknesses.parse("returns, l1tf\n") == Weak.L1TF | Weak.RETURNS
    with pytest.raises(UnknownWeaknessError) as caught:
        weaknesses.parse("l1tf,mds")
    assert "'mds'" in one_line(caught.value)


def test_what_is_accepted(parameter: Path) -> None:
    assert weaknesses.accepted() == NONE
    parameter.write_text("all\n")
    assert weaknesses.accepted() == ALL
    parameter.unlink()
    assert weaknesses.accepted() == NONE


def test_what_is_not_accepted(parameter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weaknesses, "present", lambda: Weak.L1TF | Weak.BUFFERS | Weak.MICROCODE)
    assert weaknesses.unaccepted() == Weak.L1TF | Weak.BUFFERS | Weak.MICROCODE
    parameter.write_text("l1tf,microcode\n")
    assert weaknesses.unaccepted() == Weak.BUFFERS
    parameter.write_text("buffers\n")
    assert weaknesses.unaccepted() == Weak.L1TF


@pytest.mark.parametrize(
    ("name", "kernel", "kind", "text"),
    [
        ("mds", "Mitigation: Clear CPU buffers; SMT disabled", "buffers", "1 instruction a call"),
        ("retbleed", "Mitigation: IBRS", "returns", "2 instructions a return"),
        ("indirect_target_selection", "Vulnerable, no microcode", "returns", "return thunks"),
        ("tsx_async_abort", "Mitigation: TSX disabled", "", "no transactions"),
        ("gather_data_sampling", "Mitigation: Microcode", "", "the microcode's"),
    ],
)
def test_an_answer_that_holds(name: str, kernel: str, kind: str, text: str) -> None:
    answer = _answer(name, kernel, kind)
    assert answer.holds
    assert text in answer.text


@pytest.mark.parametrize(
    ("name", "kernel", "kind", "step"),
    [
        ("l1tf", "Mitigation: PTE Inversion", "l1tf", "kernel load --accept l1tf"),
        ("mds", "Vulnerable: Clear CPU buffers attempted, no microcode", "buffers", "reboot"),
        ("gather_data_sampling", "Vulnerable: No microcode", "", "reboot"),
        (
            "mds",
            "Mitigation: Clear CPU buffers; SMT vulnerable",
            "buffers",
            "kernel load --accept siblings",
        ),
    ],
)
def test_an_answer_that_does_not_hold(name: str, kernel: str, kind: str, step: str) -> None:
    answer = _answer(name, kernel, kind)
    assert not answer.holds
    assert step in answer.next_step


def test_what_kvm_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    clears = "Mitigation: Clear CPU buffers; SMT Host state unknown"
    assert _answer("mds", clears, "buffers").holds
    monkeypatch.setattr(weaknesses, "present", lambda: Weak.BUFFERS | Weak.SIBLINGS)
    assert not _answer("mds", clears, "buffers").holds
    monkeypatch.setattr(weaknesses, "present", lambda: Weak.BUFFERS | Weak.MICROCODE)
    assert "newer microcode" in _answer("mds", clears, "buffers").text


def test_what_is_accepted_has_no_answer(parameter: Path) -> None:
    parameter.write_text("buffers\n")
    answer = _answer("mds", "Mitigation: Clear CPU buffers", "buffers")
    assert not answer.holds
    assert "guests that you trust only: a guest may read it" in answer.next_step
    # What is suggested keeps what is accepted.
    assert "--accept l1tf,buffers" in _answer("l1tf", "Vulnerable", "l1tf").next_step
