"""Every command and script that the documents show runs in some test, or in CI.

The short ones run here as shown. A table names the test or job that runs each of the others. A
command that is in neither place fails, and so does an entry that no document shows any more.
"""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from pykvm.kernel.series import offered_series
from pykvm.resources import PACKAGE
from tests.rigs.documents import (
    ROOT,
    blocks,
    documents,
    mentioned_commands,
    typed_commands,
)

_OWN: Final = "tests/test_documented_commands.py::test_"

# Exit statuses of the commands that run here, in a user's directory that has examples/.
_RUN_HERE: Final = {
    "pykvm doctor": {0, 1},
    "pykvm testbed --bring notes.txt -- sh -c 'dmesg > notes.txt'": {0},
    "pykvm testbed --memory 1024 -- grep MemTotal /proc/meminfo": {0},
    "pykvm testbed --series 6.12 -- uname -r": {0},
    "pykvm testbed --stock -- ls -l /dev/kvm": {0},
    "pykvm testbed -- python3 examples/adder.py": {0},
    "pykvm testbed -- python3 examples/hello.py": {0},
    "pykvm testbed -- python3 examples/two_vcpus.py": {0},
    "pykvm testbed -- uname -r": {0},
}

_PATCH = (
    "tests/kernel/test_distribution_source.py::test_the_whole_patch_gives_the_tree_that_is_built"
)
_BOOT = "tests/machine/linux/test_boot.py::test_it_boots_talks_and_ends"
_PAIR = "tests/measure/test_linux_pair.py::test_two_guests_use_each_other"
_COMMAND = "tests/machine/linux/test_command_run.py::test_a_command_runs_as_a_local_one"
_SERVICE = "tests/machine/linux/test_service.py::test_"
_BENCH = "tests/cli/test_bench.py::test_measurement"
_ACCEPTED = "tests/kernel/test_modules.py::test_what_is_accepted"

# Targets of make in .ci/run, or tests, that run the others.
_ELSEWHERE: Final = {
    "cd linux-source-6.12": _PATCH,
    "git add .": _PATCH,
    "git apply --index ../elisa.patch": _PATCH,
    "git commit --quiet -m source": _PATCH,
    "git diff HEAD --diff-filter=M": _PATCH,
    "git init --quiet": _PATCH,
    "make bench": _BENCH,
    "make clean": f"{_OWN}make_clean",
    "make demo": "tests/test_wheel.py::test_demo",
    "make demo-linux": _PAIR,
    "make fresh": "make fresh",
    "make fresh DEBIAN=13": "make fresh",
    'make fresh DEBIAN=13 RUN="make setup && make demo"': "make fresh",
    "make setup": "make test",
    "pipx install '.[charts,verify]'": "tests/test_wheel.py::test_no_checkout_is_near",
    "pykvm bench attach": _BENCH,
    "pykvm bench crossing": _BENCH,
    "pykvm bench interrupts": _BENCH,
    "pykvm bench protections": _BENCH,
    "pykvm bench switch": _BENCH,
    "pykvm demo-linux": _PAIR,
    "pykvm demo --capture FILE": "tests/test_wheel.py::test_demo",
    "pykvm kernel build": "tests/test_wheel.py::test_kernel_build",
    "pykvm kernel load": "tests/kernel/test_modules.py::test_restore_and_load",
    "pykvm kernel load --accept l1tf": _ACCEPTED,
    "pykvm kernel load --accept l1tf,siblings": _ACCEPTED,
    "pykvm kernel patch --series 6.12": "tests/cli/test_kernel.py::test_patch_is_printed_whole",
    "pykvm kernel patch --series 6.12 > elisa.patch": "tests/cli/test_kernel.py::"
    "test_patch_is_printed_whole",
    "pykvm kernel selftests": "make selftests",
    "pykvm run": "tests/machine/linux/test_command_run.py::test_a_shell_on_a_terminal",
    "pykvm run -- uname -r": _COMMAND,
    "pykvm run --initrd rootfs.cpio.gz": _BOOT,
    "pykvm run --memory 1G -- make test": _COMMAND,
    "pykvm run vm.toml": f"{_SERVICE}names",
    "pykvm run --kernel vmlinuz --dry-run": "tests/cli/test_run.py::test_what_would_be_started",
    'pykvm run --kernel vmlinuz --initrd rootfs.cpio.gz --append "quiet" --cpus 2 --memory 1G': (
        _BOOT
    ),
    "pykvm testbed": f"{_OWN}shell",
    "pykvm testbed --cpu sapphire_rapids -- uname -r": "make attacks",
    "pykvm testbed --cpus 2 -- nproc": "make test",
    "pykvm testbed --fast -- uname -r": "make test",
    "pykvm testbed --timeout 3600 --env PYKVM_SEQUENCE_SECONDS=600 -- python -m pytest -s ...": (
        "tests/elisa/test_call_sequences.py::test_random_sequences"
    ),
    "pykvm testbed -- python -m pytest -s tests/elisa/test_call_sequences.py": "make test",
    "pykvm testbed -- python3 -m pytest -m elisa tests": "make test",
    "pykvm testbed < SCRIPT": f"{_OWN}script_on_standard_input",
    "pykvm verify-gate": "make verify-gate",
    "tar -xf /usr/src/linux-source-6.12.tar.xz": _PATCH,
}

# Commands within the text of documents that are not the beginning of one above.
_MENTIONED: Final = {
    "pykvm console NAME": f"{_SERVICE}a_second_console",
    "pykvm gdb NAME": f"{_SERVICE}what_it_does",
    "pykvm pause NAME": f"{_SERVICE}it_stands_still_and_runs_on",
    "pykvm ps": f"{_SERVICE}it_is_listed_until_it_ends",
    "pykvm report NAME": f"{_SERVICE}what_it_does",
    "pykvm restore FOLDER": f"{_SERVICE}saved_and_restored",
    "pykvm resume NAME": f"{_SERVICE}it_stands_still_and_runs_on",
    "pykvm snapshot NAME FOLDER": f"{_SERVICE}saved_and_restored",
    "pykvm stop NAME": f"{_SERVICE}it_stands_still_and_runs_on",
    "pykvm walk NAME ADDRESS": f"{_SERVICE}what_it_does",
    "pykvm cache": "tests/cache/test_pruning.py::test_command",
    "pykvm kernel build --series S": "tests/test_wheel.py::test_kernel_build",
    "pykvm kernel selftests [--series S] [TEST...]": "make selftests",
    "pykvm kernel status": "tests/cli/test_kernel.py::test_status",
    "pykvm verify-gate --seed N --states N": "tests/test_wheel.py::test_verify_gate",
    "pykvm --version": "tests/cli/test_main.py::test_the_version_is_that_of_the_project",
    "python -m pykvm": "tests/cli/test_main.py::test_the_version_is_that_of_the_project",
    "python -m build": "tests/test_wheel.py::test_wheel_from_the_source_archive_holds_the_same",
    "python -m tools.threats_document": "tests/attacks/test_threats.py::"
    "test_the_document_is_what_the_table_says",
}

# Executable files, and the tests or jobs that start them.
_SCRIPTS: Final = {
    "benchmarks/native_switch.py": "tests/benchmarks/test_native_switch.py::test_table_and_record",
    "pykvm/measure/inside/client.py": _PAIR,
    "pykvm/measure/inside/server.py": _PAIR,
    "pykvm/testbed/suspend_button.py": "tests/testbed/test_session.py::test_warm_start_is_quick",
    "pykvm/__main__.py": "tests/cli/test_main.py::test_the_version_is_that_of_the_project",
    "tools/attacks.py": "make attacks",
    "tools/coverage_floor.py": "make test",
    "tools/fresh/__main__.py": "make fresh",
    "tools/fresh/init.py": "make fresh",
    "tools/fuzz.py": "make fuzz",
    "tools/install_packages.sh": "make test",
    "tools/side_by_side.py": "make selftests",
    "tools/test_all.py": "make test",
    "tools/threats_document.py": "tests/attacks/test_threats.py::"
    "test_the_document_is_what_the_table_says",
}


def _ci_targets() -> set[str]:
    script = (ROOT / ".ci" / "run").read_text().replace("\\\n", " ")
    lines = re.findall(r"^make (.*)$", script, re.MULTILINE)
    words = {word for line in lines for word in shlex.split(line)}
    return {word for word in words if re.fullmatch(r"[a-z-]*[a-z]", word)}


def _require_runner(what: str, runner: str) -> None:
    if runner.startswith("make "):
        assert runner.removeprefix("make ") in _ci_targets(), f"{what}: CI does not {runner}"
        return
    file, _, name = runner.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{what}: there is no {runner}"


def _pattern(command: str) -> str:
    """Return a pattern for such commands: a word in capitals stands for any word."""
    return " ".join(
        ".+" if re.fullmatch(r"[A-Z]+", word) else re.escape(word) for word in command.split()
    )


@pytest.mark.unit
def test_every_typed_command_runs_somewhere() -> None:
    shown = typed_commands()
    by_ci = {f"make {target}" for target in _ci_targets()}
    unknown = {
        command: place
        for command, place in shown.items()
        if command not in _RUN_HERE and command not in _ELSEWHERE and command not in by_ci
    }
    assert unknown == {}, "let a test run them, and say here which"
    assert {*_RUN_HERE, *_ELSEWHERE} - shown.keys() == set(), "no document shows these any more"
    for command, runner in _ELSEWHERE.items():
        _require_runner(command, runner)


@pytest.mark.unit
def test_every_mentioned_command_runs_somewhere() -> None:
    shown = mentioned_commands()
    known = {*typed_commands(), *(f"make {target}" for target in _ci_targets())}
    unknown = {
        command: place
        for command, place in shown.items()
        if command not in _MENTIONED
        and not any(re.match(rf"{_pattern(command)}(?: |$)", one) for one in known)
    }
    assert unknown == {}, "let a test run them, and say here which"
    assert _MENTIONED.keys() - shown.keys() == set(), "no document mentions these any more"
    for command, runner in _MENTIONED.items():
        _require_runner(command, runner)


@pytest.mark.unit
def test_every_script_runs_somewhere() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    elsewhere = ("tests/", "examples/", "pykvm/testbed/inside/")  # each has tests of its own
    scripts = {
        name
        for name in tracked
        if not name.startswith(elsewhere)
        and re.search(r'^#!|^if __name__ == "__main__":', (ROOT / name).read_text(), re.MULTILINE)
    }
    assert scripts - _SCRIPTS.keys() == set(), "let a test run them, and say here which"
    assert _SCRIPTS.keys() - scripts == set(), "these are no scripts any more"
    for script, runner in _SCRIPTS.items():
        _require_runner(script, runner)


@pytest.mark.unit
def test_every_example_is_run() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        if path.name != "linux.py":  # a Linux guest takes longer: tests/machine/linux/test_boot.py
            assert f"pykvm testbed -- python3 examples/{path.name}" in _RUN_HERE


@pytest.mark.unit
def test_code_in_documents_is_that_of_files() -> None:
    sources = [path.read_text() for path in (ROOT / "examples").iterdir() if path.is_file()]
    shown = [block for block in blocks() if block.language in ("c", "python")]
    assert shown
    for block in shown:
        assert block.text in sources, f"{block.document} shows what is no file of examples/"


@pytest.mark.unit
def test_every_block_says_what_it_is() -> None:
    for block in blocks():
        assert block.language in ("sh", "c", "python", "text", "toml"), (
            f"{block.document}: {block.text}"
        )
    assert any(path.name == "README.md" for path in documents())


def _environment() -> dict[str, str]:
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a directory of a user's with the examples in it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def _is_offered(command: str) -> bool:
    series = re.search(r"--series (\S+)", command)
    return series is None or series[1] in offered_series()


@pytest.mark.testbed
@pytest.mark.parametrize("command", [one for one in _RUN_HERE if _is_offered(one)])
def test_run_as_shown(command: str, work: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=work,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in _RUN_HERE[command], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if "notes.txt" in command:
        assert "Linux version" in (work / "notes.txt").read_text()
    else:
        assert done.stdout


@pytest.mark.testbed
def test_script_on_standard_input(work: Path) -> None:
    done = subprocess.run(
        ["pykvm", "testbed"],
        cwd=work,
        env=_environment(),
        input="echo $((6 * 7))\nexit 5\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "42\n"), done.stderr


@pytest.mark.testbed
def test_shell(work: Path) -> None:
    keyboard, terminal = pty.openpty()
    with subprocess.Popen(
        ["pykvm", "testbed"],
        cwd=work,
        env=_environment(),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as shell:
        assert shell.stdout is not None
        said = b""
        while not said.endswith((b"# ", b"$ ")) and (byte := shell.stdout.read(1)):
            said += byte
        os.write(keyboard, b"echo $((6 * 7)); ls; exit 7\n")
        rest, errors = shell.communicate()
    os.close(keyboard)
    os.close(terminal)
    assert shell.returncode == 7, errors
    assert b"42\r\nexamples\r\n" in rest


@pytest.mark.unit
def test_make_clean(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    extensions = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.so")]
    assert extensions
    made = ["build/demo/results.json", ".venv/bin/python", *extensions]
    kept = ["pykvm/kvm/vm.py", "guest/switch/switch.c"]
    for name in (*made, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in made if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []
