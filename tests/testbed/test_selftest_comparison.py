"""KVM's selftests: their choice, the runner's verdicts, and the comparison of two sides."""

import json

import pytest

from pykvm.testbed.selftest_comparison import (
    Comparison,
    Result,
    Selftests,
    SelftestUnknownError,
    choose,
    compare,
    parse,
)

_NAMES = ["kvm_page_table_test", "x86_64/cpuid_test", "x86_64/smm_test", "x86_64/xapic_ipi_test"]
_NAMES += ["hardware_disable_test"]


def _ended(name: str, status: int | None = 0, output: str = "", log: tuple[str, ...] = ()) -> str:
    record = {"name": name, "status": status, "seconds": 0.5, "output": output, "log": list(log)}
    return f"{json.dumps({'start': name})}\n{json.dumps(record)}\n"


@pytest.mark.unit
def test_choice_leaves_out_the_slow_and_the_useless() -> None:
    assert choose(_NAMES, []) == _NAMES[:3]
    assert choose(_NAMES, [], slow=True) == _NAMES[:4]


@pytest.mark.unit
def test_choice_by_name_and_pattern() -> None:
    assert choose(_NAMES, ["smm_test", "x86_64/cpuid_test"]) == _NAMES[1:3]
    assert choose(_NAMES, ["x*_*"]) == _NAMES[1:4]
    assert choose(_NAMES, ["hardware_disable_test"]) == _NAMES[4:]


@pytest.mark.unit
def test_choice_of_an_unknown_name() -> None:
    with pytest.raises(SelftestUnknownError, match=r"called cpu_test: .* selftests --list"):
        choose(_NAMES, ["cpu_test"])


@pytest.mark.unit
def test_parse() -> None:
    text = _ended("a") + _ended("b", 4, "1..0 # SKIP", ("kvm: odd",)) + _ended("c", None)
    results, running = parse(text.encode())
    assert running == ""
    assert results["a"] == Result(0, 0.5)
    assert results["b"] == Result(4, 0.5, "1..0 # SKIP", ["kvm: odd"])
    assert [results[name].verdict for name in "abc"] == ["pass", "skip", "too long"]


@pytest.mark.unit
def test_reasons() -> None:
    failure = (
        "==== Test Assertion Failure ====\n  x86_64/debug_regs.c:177: a == b\n  pid=186\n"
        "     1\t0x00000000004028dc: ?? ??:0\n  SINGLE_STEP[3]: exit 4\n"
    )
    assert Result(254, output=failure).reason == "x86_64/debug_regs.c:177: SINGLE_STEP[3]: exit 4"
    assert Result(4, output="1..0 # SKIP - idle pages off\n").reason == "idle pages off"
    assert Result(4, output="1..0 # SKIP - Requirement not met: a() >= 2").reason == "a() >= 2"
    assert Result(4).reason == Result(1).reason == Result(0, output=failure).reason == ""
    assert Result(None, host_died="panic").reason == "panic"


@pytest.mark.unit
def test_parse_what_a_dying_host_said() -> None:
    results, running = parse(_ended("a").encode() + b'{"start": "b"}\n{"name": "b", "stat')
    assert list(results) == ["a"]
    assert running == "b"


@pytest.mark.unit
def test_numbers_make_no_difference() -> None:
    stock = Result(0, 1.0, "took 1.25 s at 0xffff8880\n", ["comm: x pid: 12"])
    patched = Result(0, 2.0, "took 0.75 s at 0xfffe8881\n", ["comm: x pid: 14"])
    assert Comparison("a", stock, patched).same


@pytest.mark.unit
@pytest.mark.parametrize(
    ("patched", "line"),
    [
        (Result(4, 1.0, "one\ntwo\n"), "ended with: pass, patched: skip"),
        (Result(1, 1.0, "one\ntwo\n"), "ended with: pass, patched: fail 1"),
        (Result(None, 1.0, "one\n"), "ended with: pass, patched: too long"),
        (Result(None, host_died="panic"), "ended with: pass, patched: host died"),
        (Result(0, 1.0, "one\nthree\n"), "+three"),
        (Result(0, 1.0, "one\ntwo\n", ["WARNING: CPU: 0"]), "+WARNING: CPU: #"),
    ],
)
def test_differences(patched: Result, line: str) -> None:
    comparison = Comparison("a", Result(0, 1.0, "one\ntwo\n"), patched)
    assert not comparison.same
    assert line in list(comparison.differences())


@pytest.mark.unit
def test_what_ends_early_on_both_sides_is_not_compared() -> None:
    comparison = Comparison("a", Result(None, 30.0, "a"), Result(None, 30.0, "b"))
    assert comparison.same
    assert not comparison.conclusive


@pytest.mark.unit
def test_compare_keeps_the_order() -> None:
    results = {name: Result(0) for name in "abc"}
    done = compare(["c", "a", "x"], results, results)
    assert [each.name for each in done] == ["c", "a"]


@pytest.mark.testbed
def test_real_selftests_on_both_sides() -> None:
    suite = Selftests()
    assert len(suite.names) > 50
    told: list[str] = []
    names = ["x86_64/fix_hypercall_test", "x86_64/svm_vmcall_test", "x86_64/sync_regs_test"]
    done = suite.compare(names, report=lambda each: told.append(each.name))
    assert told == names
    # The middle one needs an AMD processor.
    assert [each.stock.verdict for each in done] == ["pass", "skip", "pass"]
    assert all(each.same and each.conclusive for each in done)


@pytest.mark.testbed
def test_limit_ends_a_selftest() -> None:
    (each,) = Selftests().compare(["x86_64/hyperv_clock"], limit=0.2)
    assert (each.stock.verdict, each.patched.verdict) == ("too long", "too long")
    assert not each.conclusive
