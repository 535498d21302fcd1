"""The command line as a user meets it: exit statuses, one-line errors, no tracebacks."""

import ast
import errno
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pykvm.cli import main as command
from pykvm.errors import PykvmError
from pykvm.resources import PACKAGE

pytestmark = pytest.mark.unit

_FULL = "standard output: no space left on device: free some space there"


def _pykvm(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from pykvm.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )


def _raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    doctor = importlib.import_module("pykvm.cli.doctor")

    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "run_checks", fail)
    return command.main(["doctor"])


def test_help_lists_every_subcommand() -> None:
    done = _pykvm("--help")
    assert done.returncode == 0
    for name in command.SUBCOMMANDS:
        assert re.search(rf"\n    {name}\s", done.stdout), name


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_every_subcommand_has_help(name: str) -> None:
    done = _pykvm(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: pykvm {name} ")


def test_help_imports_no_subcommand() -> None:
    script = (
        "import sys; from pykvm.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('pykvm.')], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = set(ast.literal_eval(done.stderr))
    assert imported - {"pykvm.errors"} == {
        f"pykvm.cli{module}" for module in ("", ".failures", ".main", ".streams")
    }


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"], ["kernel"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = _pykvm(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pykvm")
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _raises(monkeypatch, PykvmError("no luck; try again")) == 1
    assert capsys.readouterr().err == "pykvm: no luck; try again\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "/x/y: no space left on device: free some space there",
        ),
        (
            OSError(errno.EIO, "x", b"/x"),
            "/x: input/output error: look for failing hardware: dmesg",
        ),
        (OSError(errno.EMFILE, "x"), "too many open files: raise the limit: ulimit -n 4096"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "no directory takes temporary files: free some space, or set TMPDIR to one that does",
        ),
        (MemoryError(), "out of memory: free some memory"),
        (
            UnicodeDecodeError("utf-8", b"a name: \xff!", 8, 9, "x"),
            "b'a name: \\xff!' is no text in utf-8: use a locale with UTF-8: LC_ALL=C.UTF-8",
        ),
        (
            UnicodeEncodeError("ascii", "\u00e9t\u00e9", 0, 1, "x"),
            "'\\xe9' cannot be written in ascii: use a locale with UTF-8: LC_ALL=C.UTF-8",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _raises(monkeypatch, error) == 1
    assert capsys.readouterr().err == f"pykvm: {told}\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _raises(monkeypatch, KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), OSError(errno.EBADF, "x"), FileNotFoundError(errno.ENOENT, "x")]
)
def test_a_mistake_of_ours_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        _raises(monkeypatch, error)


def test_a_reader_that_goes_away() -> None:
    script = "import sys; from pykvm.cli.main import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", script, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        said = writer.stderr.read()
        assert writer.wait() == 141
    assert said == b""


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["", "unbuffered"])
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("doctor > /dev/full", "standard output: no space left on device: free some space there"),
        ("--help > /dev/full", "standard output: no space left on device: free some space there"),
        (
            "--version > /dev/full",
            "standard output: no space left on device: free some space there",
        ),
        ("doctor >&-", "standard output: bad file descriptor: send it somewhere else"),
        ("kernel build --kernel 6.18 2> /dev/full", ""),
        ("kernel build --kernel 6.18 2>&-", ""),
    ],
)
def test_streams_that_take_nothing(environment: dict[str, str], command: str, told: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m pykvm {command}"],
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (f"pykvm: {told}\n" if told else "")


def test_no_standard_input() -> None:
    command = f"'{sys.executable}' -m pykvm kernel status <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("KVM: ")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", b"/caf\xff/caf\xc3\xa9"), ("ascii", b"/caf\\udcff/caf\\xe9")]
)
def test_every_file_name_can_be_printed(encoding: str, shown: bytes) -> None:
    script = (
        "import sys\nfrom pykvm.cli import main, streams\nstreams.prepare()\n"
        "print('/caf\\udcff/caf\\u00e9', end='')\nstreams.settle()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout == shown


def test_no_home(tmp_path: Path) -> None:
    home = {"HOME", "PYKVM_CACHE", "XDG_CACHE_HOME"}
    script = (
        "import pwd, sys\npwd.getpwuid = lambda uid: {}[uid]\n"  # a user without an entry
        "from pykvm.cli.main import main\nsys.exit(main(['cache']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={name: value for name, value in os.environ.items() if name not in home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "pykvm: this user has no home directory for the cache: "
        "set PYKVM_CACHE to a directory that you may write\n"
    )


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script = (
        "import os, sys; os.rmdir(os.getcwd()); from pykvm.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "cache"],
        cwd=folder,
        env={**os.environ, "PYKVM_CACHE": "relative"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "pykvm: the current folder does not exist any more: change to another one\n"
    )


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    for arguments in (["-m", "pykvm"], ["-c", "from pykvm.cli.main import main; main()"]):
        done = subprocess.run(
            [sys.executable, *arguments, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"pykvm {project['version']}\n"


def test_the_package_says_that_it_has_types() -> None:
    assert (PACKAGE / "py.typed").is_file()
