"""The table of threats against its tests, and the document against the table."""

from pathlib import Path

import pytest

from pykvm.testbed.bochs import CPUS
from tests.attacks.marks import marked
from tests.attacks.threats import THREATS, Threat
from tools import attacks as suite
from tools.threats_document import DOCUMENT, document

pytestmark = pytest.mark.unit


def test_the_document_is_what_the_table_says() -> None:
    again = "run python -m tools.threats_document"
    assert DOCUMENT.read_text() == document(), again


def test_rows_are_numbered() -> None:
    assert [threat.row for threat in THREATS] == [f"T{n}" for n in range(1, len(THREATS) + 1)]


@pytest.mark.parametrize("kind", ["attack", "control"])
def test_marks_and_table_agree(kind: str) -> None:
    """Every test that a row names carries its mark, and every mark is in the table."""
    named: dict[str, set[str]] = {}
    for threat in THREATS:
        for test in threat.attacks if kind == "attack" else threat.controls:
            named.setdefault(test, set()).add(threat.row)
    assert named == marked(kind)


def test_each_row_is_complete_or_says_what_is_open() -> None:
    for threat in THREATS:
        assert threat.tries, threat.row
        assert threat.defence, threat.row
        if not threat.open:
            assert threat.attacks, threat.row
            assert bool(threat.controls) != bool(threat.no_control), threat.row


ROW = Threat("T1", "x", "y", ("a.py::test_a",), ("a.py::test_c",))
OPEN = Threat("T2", "x", "y", ("a.py::test_a",), open="all of it")


@pytest.mark.parametrize(
    ("outcomes", "line", "good"),
    [
        ({"a.py::test_a": {"passed"}, "a.py::test_c": {"passed"}}, "held; control succeeded", True),
        ({"a.py::test_a": {"passed", "failed"}, "a.py::test_c": {"passed"}}, "FAILED", False),
        ({"a.py::test_a": {"skipped"}, "a.py::test_c": {"passed"}}, "FAILED", False),
        ({"a.py::test_a": {"passed"}, "a.py::test_c": {"failed"}}, "FAILED", False),
        ({"a.py::test_a": {"passed"}}, "FAILED", False),
    ],
)
def test_a_row_falls_short(outcomes: dict[str, set[str]], line: str, good: bool) -> None:
    verdict = suite.judge(ROW, outcomes)
    assert line in verdict.text
    assert verdict.good is good


def test_an_open_row_falls_short() -> None:
    verdict = suite.judge(OPEN, {"a.py::test_a": {"passed"}})
    assert verdict == suite.Verdict("held as far as tried; OPEN: all of it", False)


def test_reports_of_several_runs(tmp_path: Path) -> None:
    """A test skipped in one run may have passed in another; a failure in any run counts."""
    case = '<testcase classname="tests.a" name="test_{}">{}</testcase>'
    for name, ends in {
        "host": {"one[x]": "<skipped/>", "two": "<skipped/>", "three": ""},
        "6.1": {"one[x]": "", "one[y]": "", "three": ""},
        "6.12": {"one[x]": "", "three": "<failure/>"},
    }.items():
        cases = "".join(case.format(*each) for each in ends.items())
        (tmp_path / f"{name}.xml").write_text(f"<testsuites>{cases}</testsuites>")
    assert suite.all_outcomes(tmp_path.glob("*.xml")) == {
        "tests/a.py::test_one": {"passed"},
        "tests/a.py::test_two": {"skipped"},
        "tests/a.py::test_three": {"passed", "failed"},
    }


def test_what_the_newer_processor_runs() -> None:
    """The run on the newer processor has no test twice: other runs leave its tests out."""
    plain, weakened = suite.plan_newer("6.1")
    assert set(weakened.files) <= set(plain.files)
    for run in (plain, weakened):
        assert "processor" in run.expression
        assert run.where[run.where.index("--cpu") + 1] in CPUS
        assert "PYKVM_REQUIRE=elisa" in run.where


def test_plan_of_several_series() -> None:
    runs = dict.fromkeys([*suite.plan("6.1", two=True), *suite.plan("6.12", two=False)])
    names = [run.name for run in runs]
    assert names == ["host", "inside-6.1", "weakened-6.1", "inside-6.12", "weakened-6.12"]
    assert [run.name for run in runs if "--cpus" in run.where] == ["inside-6.1"]
