"""Commands side by side: their order, their outputs, and that nothing of them remains."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.waiting import wait_for
from tools import side_by_side, test_all
from tools.side_by_side import Job

pytestmark = pytest.mark.unit


def _python(name: str, code: str, **environment: str | None) -> Job:
    return Job(name, [sys.executable, "-c", f"import os, sys, time\n{code}"], environment)


def test_outputs_follow_one_another(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    slow = "for n in range(3): print('a', n, flush=True); time.sleep(0.2)"
    jobs = [_python("one", slow), _python("two", "print('b'); print('c', file=sys.stderr)")]
    assert side_by_side.run(jobs, interval=0.01) == [0, 0]
    lines = capfdbinary.readouterr().out.decode().splitlines()
    shown = [line for line in lines if not line.startswith("====")]
    assert shown[:3] == ["a 0", "a 1", "a 2"]
    assert sorted(shown[3:]) == ["b", "c"]
    assert lines[0] == "==== one"
    assert lines[4].startswith("==== one: well, ")


def test_each_took_its_own_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that ends while another one's output is shown took no longer than it did."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    jobs = [_python("slow", "time.sleep(3)"), _python("quick", "")]
    assert side_by_side.run(jobs, interval=0.01) == [0, 0]
    assert re.search(r"==== quick: well, [012] s", capfd.readouterr().out)


def test_statuses_and_environment(capfd: pytest.CaptureFixture[str]) -> None:
    os.environ["PYKVM_TO_UNSET"] = "1"
    code = "sys.exit(int(os.environ['STATUS']) + ('PYKVM_TO_UNSET' in os.environ))"
    jobs = [_python(str(n), code, STATUS=str(n), PYKVM_TO_UNSET=None) for n in (0, 3, 5)]
    try:
        statuses = side_by_side.run(jobs, interval=0.01)
    finally:
        del os.environ["PYKVM_TO_UNSET"]
    assert statuses == [0, 3, 5]
    assert side_by_side.summary(jobs, statuses) == 1
    assert "==== FAILED: 3, 5" in capfd.readouterr().out
    assert side_by_side.summary(jobs[:1], statuses[:1]) == 0


@pytest.mark.parametrize(("processors", "most"), [(1, 2), (2, 1), (3, 1)])
def test_as_many_as_there_are_processors(
    processors: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones wait until the maximum number runs; the others only count."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    code = (
        f"here = {str(tmp_path)!r}; mine = os.path.join(here, str(os.getpid()))\n"
        "open(mine, 'w').close(); end = time.monotonic() + 30\n"
        "while len(os.listdir(here)) < int(os.environ['WANTED']): assert time.monotonic() < end\n"
        "time.sleep(0.2); found = len(os.listdir(here)); os.unlink(mine); sys.exit(found)"
    )
    wanted = [str(most if n < most else 0) for n in range(4)]
    jobs = [_python(str(n), code, WANTED=each) for n, each in enumerate(wanted)]
    assert max(side_by_side.run(jobs, processors, 0.01)) == most


def test_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    made, ready = str(tmp_path / "made"), str(tmp_path / "ready")
    wait = f"end = time.monotonic() + 30\nwhile not os.path.exists({ready!r}): "
    first = _python("first", f"{wait}assert time.monotonic() < end\nopen({made!r}, 'w').close()")
    look = f"sys.exit(os.path.exists({made!r}))"
    other = _python("other", f"try: {look}\nfinally: open({ready!r}, 'w').close()")
    third = _python("third", look)
    jobs = [first, other, dataclasses.replace(third, after="first")]
    assert side_by_side.run(jobs, interval=0.01) == [0, 0, 1]


def _started(tmp_path: Path, stubborn: bool) -> subprocess.Popen[str]:
    """Start two commands, each with a child; return once all four have written their PIDs."""
    code = (
        "import os, signal, sys, time\n"
        f"if {stubborn}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.fork()\n"
        f"open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w').close()\n"
        "time.sleep(60)\n"
    )
    (tmp_path.parent / "program.py").write_text(code)
    command = f"{sys.executable} {tmp_path.parent / 'program.py'}"
    two = "import os; os.sched_getaffinity = lambda _: {0, 1}\n"
    two += "from tools import side_by_side; side_by_side._PATIENCE = 1\n"
    two += f"raise SystemExit(side_by_side.main([{command!r}, {command!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", two],
        cwd=test_all.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # A shell without job control starts background commands like this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509
    )
    wait_for(lambda: len(list(tmp_path.iterdir())) == 4)
    return process


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_nothing_stays_of_what_was_interrupted(
    number: signal.Signals, status: int, stubborn: bool, tmp_path: Path
) -> None:
    (tmp_path / "pids").mkdir()
    with _started(tmp_path / "pids", stubborn) as process:
        process.send_signal(number)
        assert process.wait(20) == status
    assert _still_there(tmp_path / "pids") == []


def test_nothing_stays_of_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    with _started(tmp_path / "pids", stubborn=False) as process:
        process.kill()
        process.wait(20)
        pids = {int(path.name) for path in (tmp_path / "pids").iterdir()}
    # SIGTERM ends the commands, which have to end their children; those of this test do not.
    wait_for(lambda: len(_still_there(tmp_path / "pids")) <= 2)
    for pid in pids.intersection(_still_there(tmp_path / "pids")):
        os.kill(pid, signal.SIGKILL)


def _still_there(directory: Path) -> list[int]:
    def alive(pid: int) -> bool:
        try:
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False

    return [int(path.name) for path in directory.iterdir() if alive(int(path.name))]


def _offer(monkeypatch: pytest.MonkeyPatch, *offered: str) -> None:
    monkeypatch.setattr(test_all, "offered_series", lambda: list(offered))
    monkeypatch.setattr(test_all, "default_series", lambda: offered[0])


def test_every_test_is_in_one_part_of_make_test(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "6.1", "6.12")
    todo = test_all.jobs()
    assert [job.name for job in todo] == [
        "on this host",
        "on this host, what takes long",
        "on the emulated host, Linux 6.1 on two processors: "
        "(kvm or elisa) and not counted and not linux",
        "on the emulated host, Linux 6.1: counted",
        "on the emulated host, Linux 6.1: linux",
        "on the emulated host, Linux 6.12: (kvm or elisa) and not counted",
        "on this host, with its KVM",
    ]
    here = [word for job in todo[:2] for word in job.command if word.startswith("tests/")]
    assert sorted(here) == test_all.all_files()
    inside = todo[2:-1]
    assert {job.after for job in inside} == {todo[0].name}
    required = [word for job in todo for word in job.command if word.startswith("PYKVM_REQUIRE")]
    assert required == ["PYKVM_REQUIRE=elisa,kvm"] * 4
    assert ["--fast" in job.command for job in inside] == [False, False, True, True]
    assert ["--cpus" in job.command for job in inside] == [True, False, False, False]
    with_kvm, counted = "tests/kvm/native/test_run_loop.py", "tests/measure/test_expected_counts.py"
    linux = "tests/machine/linux/test_boot.py"
    assert [with_kvm in job.command for job in inside] == [True, False, False, True]
    assert [counted in job.command for job in inside] == [True, True, False, True]
    assert [linux in job.command for job in inside] == [True, False, True, True]
    reports = {word for job in todo for word in job.command if "junitxml" in word}
    assert len(reports) == len(todo)


def test_a_series_that_debian_has_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "6.12")
    assert [job.name for job in test_all.jobs()[2:]] == [
        "on the emulated host, Linux 6.12 on two processors: "
        "(kvm or elisa) and not counted and not linux",
        "on the emulated host, Linux 6.12: counted",
        "on the emulated host, Linux 6.12: linux",
        "on this host, with its KVM",
    ]


def test_reports_count_for_the_same_sources_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer(monkeypatch, "6.1", "6.12")
    monkeypatch.setattr(test_all, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    source = tmp_path / "tests/test_made.py"
    source.write_text("pytestmark = pytest.mark.unit\n")
    directory = tmp_path / test_all.REPORTS
    directory.mkdir(parents=True)
    (directory / "checkout").write_text(test_all.checkout_key())
    assert test_all.reports() == []
    names = ["host", "host-later", "6.1-two", "6.1-counted", "6.1-fast"]
    names += ["6.12-fast", "host-kvm"]
    for name in names:
        (directory / f"{name}.xml").touch()
    assert [report.stem for report in test_all.reports()] == names
    (tmp_path / "tests/made.so").touch()  # built, no source
    assert test_all.reports()
    source.write_text("pytestmark = pytest.mark.kvm\n")
    assert test_all.reports() == []
    (directory / "checkout").write_text(test_all.checkout_key())
    assert test_all.reports()
    (directory / "6.12-fast.xml").unlink()
    assert test_all.reports() == []
