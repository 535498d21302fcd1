"""Output and exit status of `pykvm kernel selftests`, without starting an emulator."""

from collections.abc import Callable, Sequence

import pytest

from pykvm.cli.main import main
from pykvm.testbed import selftest_comparison
from pykvm.testbed.selftest_comparison import Comparison, Result

pytestmark = pytest.mark.unit


class _Made:
    """A suite of two selftests and an excluded one; `ends` holds the results of the two."""

    ends: tuple[Result, Result] = (Result(0), Result(0))

    def __init__(self, series: str) -> None:
        self.release = f"{series}.0-made"
        self.names = ["a_test", "b_test", "hardware_disable_test"]

    def compare(
        self,
        names: Sequence[str],
        *,
        limit: float,
        distribution: bool,
        report: Callable[[Comparison], None],
    ) -> list[Comparison]:
        assert limit > 0
        assert not distribution
        done = [Comparison(name, *self.ends) for name in names]
        for each in done:
            report(each)
        return done


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[_Made]:
    monkeypatch.setattr(selftest_comparison, "Selftests", _Made)
    monkeypatch.setattr(_Made, "ends", _Made.ends)
    return _Made


def test_same(made: type[_Made], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "selftests", "--series", "6.12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("KVM selftests of Linux 6.12.0-made, 2 of 3; stock: the same source")
    assert lines[1].split() == ["stock", "patched"]
    assert lines[2].split() == ["a_test", "pass", "pass", "same"]
    assert lines[4].startswith("hardware_disable_test")
    assert "left out: stops 512 VMs" in lines[4]
    assert lines[-1].startswith("2 the same (2 pass), 0 ended early on both sides, 1 left out, 0 ")


def test_different(
    made: type[_Made], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(made, "ends", (Result(0, output="ok"), Result(254, output="bad")))
    assert main(["kernel", "selftests", "a_test"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["a_test", "pass", "fail", "254", "DIFFERENT"]
    assert "    ended with: pass, patched: fail 254" in lines
    assert "    +bad" in lines
    assert "1 DIFFERENT" in lines[-1]


def test_what_did_not_pass_says_why(
    made: type[_Made], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = Result(4, output="1..0 # SKIP - Requirement not met: kvm_cpu_has(X86_FEATURE_SVM)\n")
    monkeypatch.setattr(made, "ends", (skipped, skipped))
    assert main(["kernel", "selftests", "a_test"]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split(maxsplit=3)[1:] == ["skip", "skip", "same: kvm_cpu_has(X86_FEATURE_SVM)"]


def test_early_end_on_both_sides_is_no_sameness(
    made: type[_Made], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(made, "ends", (Result(None), Result(None)))
    assert main(["kernel", "selftests"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("not compared")
    assert lines[-1].startswith("0 the same (), 2 ended early on both sides")


def test_list(made: type[_Made], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "selftests", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a_test"
    assert lines[2].startswith("hardware_disable_test  ")


def test_unknown_name(made: type[_Made], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "selftests", "c_test"]) == 1
    assert "pykvm: no selftest is called c_test" in capsys.readouterr().err
