"""The command line as a user meets it: exit statuses, one-line errors, no tracebacks."""

import importlib
import re
import subprocess
import sys

import pytest

from pykvm.cli import main as command
from pykvm.errors import PykvmError

pytestmark = pytest.mark.unit


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
    assert done.stderr.strip() == "['pykvm.cli', 'pykvm.errors', 'pykvm.cli.main']"


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


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _raises(monkeypatch, KeyboardInterrupt()) == 130


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        _raises(monkeypatch, ZeroDivisionError())


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
