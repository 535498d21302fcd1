"""Test tiers: the needs of each test, skips that name what is missing, and their count.

Every test has at least one tier's mark. A test is skipped with the reason if this host does not
meet the needs of its tier. `PYKVM_REQUIRE=elisa,kvm` turns a skip in the named tiers into a
failure; the emulated host runs them that way.
"""

import fcntl
import functools
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from pykvm.host.emulation import counts_exactly, is_emulated
from tests.rigs import processor_features

# linux/kvm.h; the tiers must be known even if the extension module does not load.
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_CHECK_EXTENSION = 0xAE03
_KVM_CREATE_VCPU = 0xAE41
_KVM_CAP_ELISA = 0x45C1  # kvm_elisa.h


@functools.cache
def _kvm_missing() -> str:
    """Return why no test of the tier `kvm` can run here; empty if they can."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"no usable /dev/kvm: {error.strerror}"
    try:
        version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION)
        if version != 12:
            return f"/dev/kvm speaks version {version} of the API, not 12"
        vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, 0)
        try:
            os.close(fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0))
        finally:
            os.close(vm)
    except OSError as error:
        return f"/dev/kvm cannot make a virtual processor: {error.strerror}"
    finally:
        os.close(kvm)
    return ""


@functools.cache
def _elisa_missing() -> str:
    if missing := _kvm_missing():
        return missing
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        if fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, _KVM_CAP_ELISA) > 0:
            return ""
    finally:
        os.close(kvm)
    return "KVM on this host is not patched, or its processor has no VMFUNC"


@functools.cache
def _testbed_missing() -> str:
    if is_emulated():
        return "already inside the emulated host"
    return "" if shutil.which("bochs") else "no Bochs on this host"


_TIERS: dict[str, Callable[[], str]] = {
    "unit": lambda: "",
    "kvm": _kvm_missing,
    "elisa": _elisa_missing,
    "testbed": _testbed_missing,
}


def _required() -> set[str]:
    return {tier for tier in os.environ.get("PYKVM_REQUIRE", "").split(",") if tier}


def _tiers(item: pytest.Item) -> list[str]:
    return [tier for tier in _TIERS if item.get_closest_marker(tier)]


def pytest_configure(config: pytest.Config) -> None:
    if unknown := _required() - _TIERS.keys():
        raise pytest.UsageError(f"PYKVM_REQUIRE names no tier: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out(config, items)
    for item in items:
        tiers = _tiers(item)
        if not tiers:
            raise pytest.UsageError(f"{item.nodeid} has no tier: mark it {' or '.join(_TIERS)}")
        _require_spelled_out(item, tiers)
        for tier in tiers:
            if missing := _TIERS[tier]():
                item.add_marker(pytest.mark.skip(reason=f"tier {tier}: {missing}"))
                break


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Some tests need modules without a defence, others a processor with rare features, or several.
    # Ordinary runs have none of these, so nothing is missing there. A run that selects the mark
    # requires them. Tests that count run on the emulated host that counts exactly.
    emulated = is_emulated()
    named = config.getoption("markexpr")
    left_out = []
    for item in items:
        uncounted = emulated and not counts_exactly() and item.get_closest_marker("counted")
        elsewhere = emulated and item.get_closest_marker("native") and "native" not in named
        linux = item.get_closest_marker("linux")
        other = linux and linux.args and not platform.release().startswith(f"{linux.args[0]}.")
        weakened = item.get_closest_marker("weakened") and "weakened" not in named
        if uncounted or elsewhere or weakened or (emulated and other):
            left_out.append(item)
        elif lacking := _lacking(item):
            mark, reason = lacking
            if re.search(rf"\b{mark}\b", named):
                item.add_marker(pytest.mark.skip(reason=reason))
            else:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _lacking(item: pytest.Item) -> tuple[str, str] | None:
    """Return the mark of which something is missing here, and what that is."""
    for mark in item.iter_markers("processors"):
        if len(os.sched_getaffinity(0)) < mark.args[0]:
            return "processors", f"needs {mark.args[0]} processors"
    features = [name for mark in item.iter_markers("processor") for name in mark.args]
    missing = features and (_elisa_missing() or processor_features.missing(features))
    return ("processor", missing) if missing else None


def _require_spelled_out(item: pytest.Item, tiers: list[str]) -> None:
    # tools/test_all.py finds the files for the emulated host by these words in their text. It would
    # silently miss a test whose mark came from elsewhere.
    text = _text(item.path)
    for tier in {"kvm", "elisa"}.intersection(tiers):
        if f"mark.{tier}" not in text:
            raise pytest.UsageError(f"{item.nodeid}: write pytest.mark.{tier} in its own file")


@functools.cache
def _text(path: Path) -> str:
    return path.read_text()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required = _required().intersection(_tiers(item))
    if report.skipped and required and not hasattr(report, "wasxfail"):
        reason = _reason(report)
        report.outcome = "failed"
        report.longrepr = f"skipped, but PYKVM_REQUIRE={','.join(sorted(required))}: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and _required():  # a whole file, whose tiers are unknown
        report.outcome = "failed"
        report.longrepr = f"file skipped, but PYKVM_REQUIRE is set: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    # pytest represents a skip as (file, line, "Skipped: reason").
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skips = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if skips:
        terminalreporter.section("skips by reason")
        for reason, count in skips.most_common():
            terminalreporter.line(f"{count:5}  {reason}")
