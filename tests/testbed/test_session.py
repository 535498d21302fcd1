"""Commands on the real emulated host: their results, and that they leave nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from pykvm.testbed import CancelledError, CommandTimeoutError, HostDiedError, Outcome, Testbed
from tests.rigs.odd_names import ODD_NAME
from tests.rigs.waiting import wait_for

pytestmark = pytest.mark.testbed

_CHECKOUT = Path(__file__).parents[2]
_PYKVM = [
    sys.executable,
    "-c",
    "import sys; from pykvm.cli.main import main; sys.exit(main())",
    "testbed",
]


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    testbed = Testbed()
    testbed.prepare("none")  # so that no test waits for a boot
    return testbed


def _shell(testbed: Testbed, script: str, timeout: float = 60.0, **options: object) -> Outcome:
    options = {"kvm": "none", **options}
    return testbed.run(["sh", "-c", script], timeout=timeout, **options)  # type: ignore[arg-type]


def test_command_sees_the_folder_and_its_status_comes_back(testbed: Testbed) -> None:
    outcome = _shell(testbed, "pwd; uname -r; cat pyproject.toml; cat; echo bad >&2; exit 7")
    lines = outcome.stdout.decode().splitlines()
    assert outcome.status == 7
    assert lines[:2] == [str(_CHECKOUT), testbed.kernel.release]
    assert "\n".join(lines[2:]) + "\n" == (_CHECKOUT / "pyproject.toml").read_text()
    assert outcome.stderr == b"bad\n"


def test_status_of_a_command_that_a_signal_ended(testbed: Testbed) -> None:
    assert _shell(testbed, "kill -9 $$").status == 128 + signal.SIGKILL


def test_missing_command(testbed: Testbed) -> None:
    outcome = testbed.run(["no-such-command"], kvm="none")
    assert outcome.status == 127
    assert b"no-such-command" in outcome.stderr


def test_output_comes_while_the_command_runs(testbed: Testbed) -> None:
    arrived: list[float] = []
    # In instructions, since the emulated clock jumps while the processor is idle.
    work = "python3 -c 'for i in range(600000): pass'"
    script = f"echo first; {work}; echo second"
    _shell(testbed, script, stdout=lambda data: arrived.append(time.monotonic()))
    assert arrived[-1] - arrived[0] > 0.5


def test_warm_start_is_quick(testbed: Testbed) -> None:
    outcome = testbed.run(["python3", "-c", "print(1)"], kvm="none")
    assert outcome.stdout == b"1\n"
    assert outcome.first_output is not None
    assert outcome.first_output < 10.0


def test_no_byte_of_much_output_is_lost(testbed: Testbed) -> None:
    outcome = _shell(testbed, "seq 1 8000")
    assert outcome.stdout.decode().split() == [str(n) for n in range(1, 8001)]


def test_standard_input_and_variables(testbed: Testbed) -> None:
    outcome = _shell(testbed, "cat; echo $NAME", stdin=b"typed\n", environment={"NAME": "a b"})
    assert outcome.stdout == b"typed\na b\n"


def test_files_come_back(testbed: Testbed) -> None:
    name = f"from-testbed-{uuid.uuid4().hex}"
    build = _CHECKOUT / "build" / name
    other = _CHECKOUT / name
    try:
        outcome = _shell(
            testbed,
            f"mkdir -p build/{name}/sub; seq 1 99999 > build/{name}/sub/file; chmod 755 "
            f"build/{name}/sub/file; ln -s sub/file build/{name}/link; echo x > {name}; "
            f"echo y > {name}.stays",
            bring=[name],
        )
        assert outcome.status == 0
        assert sorted(outcome.brought) == sorted([build / "sub/file", build / "link", other])
        assert len((build / "link").read_text().splitlines()) == 99999
        assert (build / "sub/file").stat().st_mode & 0o777 == 0o755
        assert other.read_text() == "x\n"
        assert not other.with_name(f"{name}.stays").exists()
    finally:
        other.unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", build], check=True)


def test_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    (folder / ODD_NAME.replace("\n", "")).write_text("in")
    testbed = Testbed(folder)
    outcome = _shell(testbed, 'pwd; cat a*; mkdir build; echo out > "build/$(ls | head -1)"')
    assert outcome.status == 0
    assert outcome.stdout == os.fsencode(folder) + b"\nin"
    assert [path.read_text() for path in outcome.brought] == ["out\n"]
    assert outcome.brought == [folder / "build" / ODD_NAME.replace("\n", "")]


def test_nothing_outside_the_folder_comes_back(testbed: Testbed) -> None:
    with pytest.raises(Exception, match=f"is outside {_CHECKOUT}"):
        _shell(testbed, "true", bring=["../other"])


def test_two_at_a_time(testbed: Testbed) -> None:
    outcomes: dict[int, Outcome] = {}

    def run(number: int) -> None:
        outcomes[number] = _shell(testbed, f"echo {number} > /tmp/mine; cat /tmp/mine")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcomes[number].stdout for number in range(2)] == [b"0\n", b"1\n"]


def test_counts_repeat_exactly(testbed: Testbed) -> None:
    script = (
        "import time\n"
        "start = time.perf_counter_ns()\n"
        "for i in range(100000): pass\n"
        "print(time.perf_counter_ns() - start)"
    )
    counts = {testbed.run(["python3", "-c", script], kvm="none").stdout for _ in range(2)}
    assert len(counts) == 1
    assert int(counts.pop()) > 0


def test_timeout(testbed: Testbed) -> None:
    with pytest.raises(CommandTimeoutError, match=r"did not end in 1 s \(logs: .*\.log\)"):
        _shell(testbed, "while :; do :; done", timeout=1)


def test_kernel_panic_is_told_with_its_log(testbed: Testbed) -> None:
    with pytest.raises(HostDiedError, match=r"kernel panicked \(logs: ") as caught:
        _shell(testbed, "echo c > /proc/sysrq-trigger")
    log = Path(str(caught.value).rpartition("logs: ")[2].rstrip(")")).read_text()
    assert "sysrq triggered crash" in log


def test_stock_kvm_and_the_vmfunc_msr(testbed: Testbed) -> None:
    script = (
        "import os\n"
        "os.system('modprobe msr')\n"
        "msr = os.open('/dev/cpu/0/msr', os.O_RDONLY)\n"
        "print(int.from_bytes(os.pread(msr, 8, 0x491), 'little'), os.path.exists('/dev/kvm'))"
    )
    outcome = testbed.run(["python3", "-c", script], kvm="stock", timeout=60)
    assert outcome.stdout == b"1 True\n"


def test_without_kvm(testbed: Testbed) -> None:
    assert _shell(testbed, "test ! -e /dev/kvm && ! grep kvm /proc/modules").status == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_runs_on_when_the_command_line_is_killed(
    testbed: Testbed, number: signal.Signals
) -> None:
    # A runner in a shell's background ignores SIGINT, and so would its children.
    command = ["env", "--default-signal=INT", *_PYKVM, "--no-kvm"]
    command += ["--", "sh", "-c", "echo up; while :; do :; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_CHECKOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        inside = _descendants(process.pid)
        assert any("bochs" in name for name in inside.values())
        process.send_signal(number)
        try:
            process.wait(20)
        finally:
            process.kill()
    wait_for(lambda: not _alive(inside))


def test_nothing_runs_on_when_another_thread_cancels(testbed: Testbed) -> None:
    cancelled = threading.Event()
    before = _descendants(os.getpid())
    running: dict[int, str] = {}

    def cancel(_: bytes) -> None:
        running.update(_descendants(os.getpid()))
        cancelled.set()

    with pytest.raises(CancelledError):
        _shell(testbed, "echo up; while :; do :; done", cancelled=cancelled, stdout=cancel)
    inside = {pid: name for pid, name in running.items() if pid not in before}
    assert any("bochs" in name for name in inside.values())
    wait_for(lambda: not _alive(inside))


def _descendants(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found[child] = Path(f"/proc/{child}/comm").read_text().strip()
                waiting.append(child)
    return found


def _alive(processes: dict[int, str]) -> list[int]:
    left = []
    for pid, name in processes.items():
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            continue
        state = text.rpartition(")")[2].split()[0]
        if state not in "ZX" and f"({name})" in text:
            left.append(pid)
    return left


def test_directories_of_killed_instances_go(testbed: Testbed) -> None:
    cache = Path(os.environ.get("PYKVM_CACHE", Path.home() / ".cache/pykvm"))
    dead = cache / "testbed-instances" / f"dead-{uuid.uuid4().hex}"
    dead.mkdir(parents=True)
    (dead / "alive").touch()  # no process holds it
    os.utime(dead, (0, 0))
    assert _shell(testbed, "true").status == 0
    assert not dead.exists()
